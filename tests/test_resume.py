"""A run that was stopped and goes on ends as the run in one piece does, bit for bit."""

import json
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.registry import ALGORITHMS
from utils.record import Record

#: What tells how long a run took, and how often it was stopped; all else must be the same.
COSTS = {"resumed_at_steps", "train_seconds", "evaluation_seconds", "peak_memory_bytes"}

#: Options that reach more of the state of some algorithms.
EXTRA = {
    "er": "--replacement --reservoir inclusive",
    "lamaml": "--use_old_task_memory --second_order",
    "sync": "--log_alignment",
    "mer": "--batches_per_example 2 --log_alignment",
    "meta_bgd": "--sample_rates",
    "ewc": "--memory_strength 10",
    "icarl": "--n_memories 30",
}


def contents(folder):
    """Every file of a record by its path within it; of JSON what is no cost, of events tag, step and value."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in COSTS}
        elif "tfevents" in path.name:
            events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
            found[name] = {
                tag: [(event.step, str(event.value)) for event in events.Scalars(tag)]
                for tag in events.Tags()["scalars"]
            }
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def assert_same_record(first, second):
    first, second = contents(first), contents(second)
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith("training_parameters.json"):
            for parameters in (first[name], second[name]):
                del parameters["command"]
        assert first[name] == second[name], name


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n, signal) sends the signal to this process when the n-th event from now on is recorded."""
    add = Record.add

    def stop_at(n, number=signal.SIGTERM):
        left = [n]

        def spy(record, event):
            add(record, event)
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(number)

        monkeypatch.setattr(Record, "add", spy)

    return stop_at


@pytest.mark.parametrize("name", ALGORITHMS)
def test_stopped_anywhere_it_ends_as_in_one_piece(name, run, stop_at, capsys):
    line = f"--model {name} --seeds 0 1 --n_epochs 2 --log_every 3 {EXTRA.get(name, '')}"
    whole = run(line)
    stop_at(10)  # within the first task, at a step
    stopped = run(line)
    assert (stopped.status, stopped.exit_code) == ("interrupted", 143)
    assert f"--resume {stopped.folder}" in capsys.readouterr().out
    stop_at(8)  # an evaluation, or another step
    again = run(f"--resume {stopped.folder}", small=False)
    assert again.folder == stopped.folder and again.exit_code == 143
    stop_at(0)
    resumed = run(f"--resume {stopped.folder}", small=False)
    assert resumed.exit_code == 0 and resumed.folder == stopped.folder
    assert_same_record(whole.folder, resumed.folder)
    results = json.loads((resumed.folder / "1" / "results.json").read_text())
    assert len(results["resumed_at_steps"]) == 2 and 0 < results["resumed_at_steps"][0] < results["steps"]
    assert not (resumed.folder / "checkpoints").exists()
