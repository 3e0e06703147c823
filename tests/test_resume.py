"""A run that was stopped and goes on ends as the run in one piece does, bit for bit."""

import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.faults import published_streams
from benchmarks.records import COSTS, contents, differences
from model.lookahead import LookaheadMAML
from model.online import Online
from model.registry import ALGORITHMS
from utils import interruption, run_folder
from utils.checkpoint import Checkpoints
from utils.config import configure
from utils.record import Record
from utils.run_folder import RunFolder

ROOT = Path(__file__).parent.parent

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


pytestmark = pytest.mark.usefixtures("quick_plots")


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n, signal) sends the signal to this process when the n-th event from now on is recorded; 0: never."""
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


@pytest.fixture
def resume(run):
    return lambda folder, more="": run(f"--resume {folder} {more}", small=False)


@pytest.mark.parametrize(
    ("name", "extra"), [*((name, EXTRA.get(name, "")) for name in ALGORITHMS), ("oml", "--head gaussian")]
)
def test_stopped_anywhere_it_ends_as_in_one_piece(name, extra, run, resume, stop_at, capsys):
    line = f"--model {name} --seeds 0 1 --n_epochs 2 --log_every 3 {extra}"
    whole = run(line)
    stop_at(10)
    stopped = run(line)
    assert (stopped.status, stopped.exit_code) == ("interrupted", 143)
    assert f"--resume {stopped.folder}" in capsys.readouterr().out
    stop_at(8)
    again = resume(stopped.folder)
    assert again.folder == stopped.folder and again.exit_code == 143
    stop_at(0)
    resumed = resume(stopped.folder)
    assert resumed.exit_code == 0 and resumed.folder == stopped.folder
    assert not differences(whole.folder, resumed.folder)
    results = json.loads((resumed.folder / "1" / "results.json").read_text())
    assert len(results["resumed_at_steps"]) == 2 and 0 < results["resumed_at_steps"][0] < results["steps"]
    assert not (resumed.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    "stream", ["mnist_rotations", "mnist_permutations", "mnist_manypermutations", "digits_rotations"]
)
@pytest.mark.parametrize("event", [1, 2, 6, 12])
def test_every_stream_and_every_kind_of_moment(stream, event, run, resume, stop_at, tmp_path):
    """Stopped after the first evaluation, a step, an evaluation within a task, one at its end."""
    line = f"--model er --dataset {stream} --data_path {published_streams(tmp_path)} --seeds 3 5 --log_every 3"
    whole = run(line)
    stop_at(event)
    stopped = run(line)
    stop_at(0)
    assert not differences(whole.folder, resume(stopped.folder).folder)


def test_a_comparison_that_finds_what_differs(run):
    one, same, other = run("--model er --seed 0"), run("--model er --seed 0"), run("--model er --seed 0 --lr 0.07")
    assert not differences(one.folder, same.folder)
    assert "0/results.pt" in differences(one.folder, other.folder)
    (same.folder / "0" / "events.out.tfevents").unlink()
    assert differences(one.folder, same.folder) == ["0/events.out.tfevents"]
    assert {name.rpartition("/")[2] for name in contents(one.folder)} >= {"results.pt", "results.json", "summary.json"}
    assert {"resumed_at_steps", "train_seconds", "evaluation_seconds", "peak_memory_bytes"} == COSTS


def test_a_learner_goes_on_with_its_pre_training_too(run, resume, stop_at, monkeypatch):
    """Checkpoints within it; its steps are none of the stream's."""

    def pretrain(self, stream, step):
        draws = np.stack([rng.standard_normal(self.weights.shape[1]) for rng in self.random["pretraining"]])
        self.weights += torch.from_numpy(draws).to(self.weights) * 0.01
        return self.weights.norm(dim=1)

    monkeypatch.setattr(Online, "pretraining_steps", 60)
    monkeypatch.setattr(Online, "pretrain", pretrain)
    line = "--model online --seeds 0 1 --checkpoint_minutes 0"
    whole = run(line)
    events = contents(whole.folder)["0/events.out.tfevents"]
    assert len(events["pretraining_loss"]) == 60 and len(events["loss"]) == 12
    stop_at(30)
    with pytest.raises(SystemExit) as stop:
        run(line)
    assert stop.value.code == 143
    (folder,) = [path for path in whole.folder.parent.iterdir() if path != whole.folder]
    stop_at(35)
    assert resume(folder).exit_code == 143
    stop_at(0)
    assert not differences(whole.folder, resume(folder).folder)


def test_the_same_command_with_auto_begins_goes_on_and_is_finished(run, stop_at, capsys):
    line = "--model er --seeds 0 1 --resume auto"
    stop_at(9, signal.SIGINT)
    first = run(line)
    assert first.exit_code == 130
    other = run("--model er --seeds 0 1 --lr 0.07 --resume auto")
    assert other.folder != first.folder, "another configuration is another run"
    capsys.readouterr()
    second = run(line)
    assert second.folder == first.folder and second.exit_code == 0
    assert "going on with" in capsys.readouterr().err
    for line_ in (line, f"--resume {first.folder}", f"--resume {first.folder / '0'}"):
        before = contents(first.folder)
        with pytest.raises(SystemExit) as stop:
            run(line_, small=line_ == line)
        assert stop.value.code == 0
        assert f"{first.folder} is finished (completed)" in capsys.readouterr().err
        assert contents(first.folder) == before
    assert run("--model er --seeds 0 1").folder != first.folder, "without --resume a new run begins"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--lr 0.3", "--lr 0.05, not 0.3"),
        ("--seed 4", "--seeds [0, 1], not [4]"),
        ("--model online", "--model er, not online"),
        ("--model nosuch", "--model nosuch"),
        ("--dataset mnist_rotations", "--dataset digits_rotations, not mnist_rotations"),
        ("--n_tasks 4", "--n_tasks 3, not 4"),
        ("--as_published", "--as_published False, not True"),
        ("--nosuch 1", "--nosuch"),
        ("--lr x", "--lr x"),
    ],
)
def test_a_run_goes_on_with_its_own_options_only(more, said, run, stop_at, refused):
    stop_at(5)
    stopped = run("--model er --lr 0.05 --seeds 0 1")
    assert said in refused(f"--resume {stopped.folder} {more}")


def test_where_things_lie_and_how_long_it_runs_may_change(run, resume, stop_at):
    whole = run("--model er --lr 0.05 --seeds 0 1")
    stop_at(5)
    stopped = run("--model er --lr 0.05 --seeds 0 1")
    stop_at(0)
    moved = stopped.folder.rename(stopped.folder.parent / "elsewhere")
    more = "--model eralg4 --lr 5e-2 --seeds 0 1 --time_limit 9 --checkpoint_minutes 1 --log_dir x --cuda no"
    assert not differences(whole.folder, resume(moved, more).folder)


def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_folder(run, resume, monkeypatch, capsys):
    def killed(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("utils.loop.evaluate", killed)
        with pytest.raises(ZeroDivisionError):
            run("--model er --seed 0")
        whole = None
    (parameters,) = Path(run.log_dir).rglob("training_parameters.json")
    resumed = resume(parameters.parent.parent)
    assert "from the start" in capsys.readouterr().err
    whole = run("--model er --seed 0")
    assert not differences(whole.folder, resumed.folder)


def test_what_was_recorded_after_the_last_checkpoint_is_there_once(run, resume, killed):
    """As if killed in the third task, two evaluations after the checkpoint at the end of the second."""
    line = "--model er --seeds 0 1 --log_every 1 --checkpoint_minutes 100"
    whole, folder = run(line), killed(lambda: run(line), 22)
    steps = [step for step, _ in contents(folder)["0/events.out.tfevents"]["accuracy_test/task_00"]]
    assert max(steps) > 8
    assert not differences(resume(folder).folder, whole.folder)
    assert json.loads((folder / "summary.json").read_text())["resumed_at_steps"] == [8]


def test_what_is_known_of_a_replica_that_diverged_goes_on_too(run, resume, stop_at, monkeypatch):
    begin, observe = LookaheadMAML.begin_task, LookaheadMAML.observe

    def begin_task(self, t):
        begin(self, t)
        if t == 2:
            self.rates[1, 5] = torch.inf

    def deaf(self, x, t, y):
        return torch.ones(2) if t == 2 else observe(self, x, t, y)

    monkeypatch.setattr(LookaheadMAML, "begin_task", begin_task)
    monkeypatch.setattr(LookaheadMAML, "observe", deaf)
    whole = run("--model lamaml --seeds 0 1")
    stop_at(14)
    stopped = run("--model lamaml --seeds 0 1")
    assert stopped.exit_code == 143
    stop_at(0)
    resumed = resume(stopped.folder)
    assert (resumed.exit_code, list(resumed.faults)) == (3, [1])
    assert resumed.faults[1].parameters_of_step == 8 and not differences(resumed.folder, whole.folder)


@pytest.mark.parametrize("more", ["", "--checkpoint_minutes 0"])
def test_where_all_replicas_have_diverged_the_end_does_not_depend_on_checkpoints(more, run, resume, stop_at):
    """They diverge at step 1, which is seen at the end of the task; stopped in between, that is no end yet."""
    line = "--model er --lr 1e20 --seeds 0 1"
    whole = run(line)
    assert (whole.exit_code, whole.status, stopped_step(whole)) == (3, "diverged", 4)
    stop_at(4)
    stopped = run(f"{line} {more}")
    assert (stopped.exit_code, stopped.status) == (143, "interrupted")
    stop_at(0)
    resumed = resume(stopped.folder, "--checkpoint_minutes 5")
    assert (resumed.exit_code, resumed.status) == (3, "diverged")
    told = ["0/training_parameters.json", "1/training_parameters.json"] if more else []
    assert differences(whole.folder, resumed.folder) == told


def test_a_run_that_diverged_is_finished_with_the_same_exit_code(run, capsys):
    line = "--model er --lr 1e20 --seed 0 --resume auto"
    assert run(line).exit_code == 3
    with pytest.raises(SystemExit) as stop:
        run(line)
    assert stop.value.code == 3 and "finished (diverged)" in capsys.readouterr().err


def test_as_published_and_validated_runs_go_on_too(run, resume, stop_at):
    line = "--model lamaml --as_published --validation 0.2 --evaluate_on validation --calc_test_accuracy --seeds 0 1"
    whole = run(line)
    stop_at(7)
    stopped = run(line)
    stop_at(0)
    assert not differences(whole.folder, resume(stopped.folder, "--as_published").folder)


def test_a_run_that_began_on_a_device_that_is_gone_goes_on_elsewhere(run, resume, stop_at):
    whole = run("--model er --seeds 0 1")
    stop_at(7)
    stopped = run("--model er --seeds 0 1")
    stop_at(0)
    path = stopped.folder / "0" / "training_parameters.json"
    told = json.loads(path.read_text())
    told["options"]["device"] = "cuda:7"
    path.write_text(json.dumps(told))
    with pytest.raises(SystemExit):
        resume(stopped.folder)
    resumed = resume(stopped.folder, "--device cpu")
    np.testing.assert_array_equal(whole.matrices, resumed.matrices)


def test_the_last_two_checkpoints_are_kept(run, stop_at):
    stop_at(9)
    stopped = run("--model er --seed 0 --checkpoint_minutes 0")
    found = Checkpoints(stopped.folder / "checkpoints").paths()
    assert len(found) == 2 and {path.name for path in found[0].parent.iterdir()} == {"lock", *(p.name for p in found)}
    content, problems = Checkpoints(stopped.folder / "checkpoints").load()
    assert content["loop"]["step"] == stopped_step(stopped) and not problems


def stopped_step(result):
    return json.loads((result.folder / "summary.json").read_text())["steps"]


def test_a_run_that_was_stopped_tells_what_it_measured(run, stop_at):
    stop_at(8)
    result = run("--model er --seed 0")
    results = json.loads((result.folder / "0" / "results.json").read_text())
    assert results["status"] == "interrupted" and results["steps"] == 6
    assert np.isnan(result.matrices[0, 2]).all() and not np.isnan(result.matrices[0, 0]).any()


# ---------------------------------------------------------------- how it is stopped


def test_a_time_limit_stops_a_run_by_itself(run, resume):
    line = "--model er --seeds 0 1 --n_epochs 400"
    whole = run(line)
    stopped = run(f"{line} --time_limit 0.02")  # loading and the first evaluation take a tenth of it
    assert (stopped.status, stopped.exit_code) == ("interrupted", 143)
    told = ["0/training_parameters.json", "1/training_parameters.json"]  # the time limit is there
    assert differences(whole.folder, resume(stopped.folder, "--time_limit 0").folder) == told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_that_takes_too_long_is_given_up(number, run, resume, monkeypatch):
    """What it had changed is forgotten: the run goes on from the last checkpoint."""
    whole = run("--model lamaml --seeds 0 1")
    monkeypatch.setattr(interruption, "PATIENCE", 0.3)
    observe, calls = LookaheadMAML.observe, []

    def slow(self, x, t, y):
        loss = observe(self, x, t, y)
        calls.append(t)
        if len(calls) == 6:
            signal.raise_signal(number)
            time.sleep(20)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(LookaheadMAML, "observe", slow)
        began = time.monotonic()
        stopped = run("--model lamaml --seeds 0 1")
    assert time.monotonic() - began < 10 and stopped.exit_code == 128 + number
    assert not differences(whole.folder, resume(stopped.folder).folder)


def test_an_evaluation_is_given_up_at_once_and_loses_nothing(run, resume, monkeypatch):
    whole = run("--model er --seeds 0 1 --log_alignment --checkpoint_minutes 100")
    predict, calls = ALGORITHMS["er"].learner.predict, []

    def slow(self, x, t=None):
        calls.append(t)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(20)
        return predict(self, x, t)

    with monkeypatch.context() as patch:
        patch.setattr(ALGORITHMS["er"].learner, "predict", slow)
        began = time.monotonic()
        stopped = run("--model er --seeds 0 1 --log_alignment --checkpoint_minutes 100")
    assert stopped.exit_code == 143 and time.monotonic() - began < interruption.PATIENCE
    steps = stopped_step(stopped)
    resumed = resume(stopped.folder)
    assert json.loads((resumed.folder / "summary.json").read_text())["resumed_at_steps"] == [steps] and steps == 8
    assert not differences(whole.folder, resumed.folder)


def test_stopped_while_data_are_loaded_it_leaves_nothing(run, monkeypatch, capsys):
    def slow(*args):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(20)

    monkeypatch.setattr("utils.experiment.build_stream", slow)
    with pytest.raises(SystemExit) as stop:
        run("--model er --seed 0")
    assert stop.value.code == 143
    assert "interrupted before there was anything to record" in capsys.readouterr().err
    assert not list(Path(run.log_dir).rglob("*"))


def test_a_signal_while_the_record_is_closed_does_not_tear_it(run, monkeypatch):
    write = Record._write_seed

    def hurried(self, replica, *args):
        if replica == 0:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
        return write(self, replica, *args)

    monkeypatch.setattr(Record, "_write_seed", hurried)
    monkeypatch.setattr(interruption, "PATIENCE", 0.01)
    result = run("--model online --seeds 0 1")
    assert result.exit_code == 0 and (result.folder / "summary.json").exists()
    assert (result.folder / "1" / "results.json").exists()


@contextlib.contextmanager
def started(tmp_path, *line):
    """main.py in a process of its own, once it has taken a checkpoint; and its folder."""
    size = "--n_tasks 3 --samples_per_task 300 --n_hiddens 16 --n_epochs 500 --seeds 0 1 --checkpoint_minutes 0.001"
    command = [sys.executable, "main.py", "--log_dir", str(tmp_path), *size.split(), *line]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 100
            while not (found := list(tmp_path.glob("*/*/checkpoints/*.pt"))) and time.monotonic() < deadline:
                time.sleep(0.05)
            yield process, found[0].parent.parent
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_gets_a_signal_ends_soon_and_in_order(number, tmp_path):
    with started(tmp_path, "--model", "er") as (process, folder):
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # as `uv run` does: it passes on what the terminal has sent already
        began = time.monotonic()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 128 + number and time.monotonic() - began < 10
    assert "Traceback" not in said
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert len(list((folder / "checkpoints").glob("*.pt"))) == 2


def test_a_second_signal_ends_a_process_at_once(tmp_path):
    with started(tmp_path, "--model", "mer", "--batches_per_example", "1000000") as (process, folder):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "its step takes long, and it waits"
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=30) == -signal.SIGTERM and time.monotonic() - began < 2
    assert not (folder / "summary.json").exists() and not list(folder.rglob(".partial-*"))


def test_a_folder_in_use_is_refused(tmp_path, refused):
    with started(tmp_path, "--model", "er") as (process, folder):
        message = refused(f"--resume {folder}")
        assert "in use" in message and str(process.pid) in message
        process.kill()
        process.wait()
    assert (folder / "checkpoints" / "lock").exists(), "the lock goes with the process, not with the file"
    (folder / "0" / "training_parameters.json").unlink()
    (folder / "1" / "training_parameters.json").unlink()
    assert "no record of a run" in refused(f"--resume {folder}")


def _create(barrier, log_dir, queue):
    config = configure(["--log_dir", log_dir, "--seed", "0"])
    barrier.wait()
    folders = [RunFolder.create(config, "digest") for _ in range(20)]
    queue.put([str(folder.path) for folder in folders])


def test_runs_started_at_the_same_instant_never_share_a_folder(tmp_path, monkeypatch):
    """Eight processes make twenty folders each, on a clock that knows milliseconds only."""
    real = datetime.datetime

    class Coarse(real):
        @classmethod
        def now(cls):
            now = real.now()
            return now.replace(microsecond=now.microsecond // 1000 * 1000)

    monkeypatch.setattr(run_folder.datetime, "datetime", Coarse)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_create, args=(barrier, str(tmp_path), queue)) for _ in range(8)]
    for process in processes:
        process.start()
    made = [folder for _ in processes for folder in queue.get(timeout=60)]
    for process in processes:
        process.join()
    assert len(made) == len(set(made)) == 160
    assert len(os.listdir(tmp_path / "lamaml")) == 160
