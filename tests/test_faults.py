"""What cannot be trusted is refused in one sentence; what goes wrong around a run loses nothing."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.faults import Archives, damaged, published_streams
from benchmarks.records import differences
from model.er import ER
from utils import atomic, checkpoint, run_folder, tensors
from utils.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def stopped(run, killed):
    """The folder of a run that was stopped with two checkpoints, and that of the same run in one piece."""
    line = "--model er --seeds 0 1 --lr 0.05 --checkpoint_minutes 0"
    return killed(lambda: run(line), 12), run(line).folder


def rewritten(path: Path, content) -> None:
    """Another checkpoint in the place of this one, with a digest that is right."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors.write(path, content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[: checkpoint.DIGITS]
    path.rename(path.parent / f"{path.stem.partition('-')[0]}-{digest}.pt")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("case", range(8))
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(case, stopped, run, capsys):
    folder, whole = stopped
    newest, _ = Checkpoints(folder / "checkpoints").paths()
    newest.write_bytes(damaged(random.Random(case), newest.read_bytes()))
    assert run(f"--resume {folder}", small=False).exit_code == 0
    assert f"checkpoint {newest} is not used: its content is not what was written" in capsys.readouterr().err
    assert not differences(folder, whole)


def test_without_a_sound_checkpoint_it_is_refused(stopped, refused):
    folder, _ = stopped
    for path in Checkpoints(folder / "checkpoints").paths():
        path.write_bytes(path.read_bytes()[:-1])
    message = refused(f"--resume {folder}")
    assert "no checkpoint that can be used" in message and "without --resume" in message


def test_a_checkpoint_that_would_run_code_is_refused(stopped, refused, tmp_path):
    folder, _ = stopped
    paths = Checkpoints(folder / "checkpoints").paths()
    traps = [tmp_path / "sprung0", tmp_path / "sprung1"]
    rewritten(paths[0], pickle.dumps({"format": 1, "learner": Evil(traps[0])}, protocol=2))
    rewritten(paths[1], {"format": 1, "learner": Evil(traps[1])})
    message = refused(f"--resume {folder}")
    assert "could run code" in message
    assert not any(trap.exists() for trap in traps)
    with pytest.raises(ValueError, match="could run code"):
        tensors.load(Checkpoints(folder / "checkpoints").paths()[1])
    assert not traps[1].exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(format=99), "format 1"),
        (lambda content: content.pop("loop"), "does not fit"),
        (lambda content: content["learner"].pop("weights"), "does not fit"),
        (lambda content: content["learner"].update(weights=torch.zeros(2, 3)), "does not fit"),
        (lambda content: content["options"].update(lr=9.0), "does not fit"),
        (lambda content: content.update(record={"evaluations": [{}], "event_bytes": [0, 0]}), "does not fit"),
        (lambda content: content.update(learner=None), "does not fit"),
        (lambda content: content["loop"].update(divergence=7), "does not fit"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change, said, stopped, refused):
    folder, _ = stopped
    newest, older = Checkpoints(folder / "checkpoints").paths()
    content = tensors.load(newest)
    change(content)
    rewritten(newest, content)
    older.unlink()
    assert said in refused(f"--resume {folder}")


def test_a_damaged_checkpoint_never_counts_as_one_that_is_kept(stopped):
    folder, _ = stopped
    checkpoints = Checkpoints(folder / "checkpoints")
    newest, older = checkpoints.paths()
    newest.write_bytes(newest.read_bytes()[:-1])
    content, problems = checkpoints.load()
    assert len(problems) == 1
    count = int(older.stem.partition("-")[0])
    new = checkpoints.save(count + 1, {"loop": content["loop"]})
    assert checkpoints.paths() == [new, older]


@pytest.mark.parametrize("content", [b"", b"\x80\x02J\x01", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(100)])
def test_a_checkpoint_of_anything_at_all_is_refused(content, stopped, refused):
    folder, _ = stopped
    for path in Checkpoints(folder / "checkpoints").paths():
        rewritten(path, content)
    assert "no checkpoint that can be used" in refused(f"--resume {folder}")


def test_a_record_without_its_checkpoints_or_events_is_no_silent_start(stopped, run, refused, capsys):
    folder, _ = stopped
    (folder / "1" / "events.out.tfevents").write_bytes(b"")
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    run(f"--resume {folder}", small=False)
    assert "1/events.out.tfevents lacks events of before the stop" in capsys.readouterr().err
    (copy / "summary.json").write_text('{"status": "interrupted"}')
    shutil.rmtree(copy / "checkpoints")
    assert "no checkpoint any more" in refused(f"--resume {copy}")


def test_a_checkpoint_that_would_unpack_to_more_than_its_size_is_refused(tmp_path):
    bomb, packed = tmp_path / "bomb.pt", tmp_path / "packed.pt"
    tensors.save(bomb, {"x": torch.zeros(10**6)})
    with zipfile.ZipFile(bomb) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert packed.stat().st_size < 0.01 * bomb.stat().st_size
    with pytest.raises(ValueError, match="compressed"):
        tensors.load(packed)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a.pt", "b.pt"):
        tensors.save(tmp_path / name, {"x": torch.arange(3), "y": [1, "two"]})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_damaged_parameters_of_a_run_are_refused(stopped, refused):
    folder, _ = stopped
    for file in ("{", "[]", '{"model": "er", "options": {}}'):
        (folder / "0" / "training_parameters.json").write_text(file)
        assert "no record of a run" in refused(f"--resume {folder}")
    parameters = json.loads((folder / "1" / "training_parameters.json").read_text())
    for change, said in (
        ({"options": {**parameters["options"], "memories": 7}}, "does not fit"),
        ({"options": {**parameters["options"], "lr": -1}}, "--lr -1"),
        ({"options": {**parameters["options"], "former": 1}}, "another version, which had --former"),
        ({"model": "nosuch"}, "nosuch"),
        ({"data_sha256": "0" * 64}, "other data"),
        *(({name: 3.5}, "no record of a run") for name in ("model", "dataset", "data_sha256", "seeds", "versions")),
    ):
        (folder / "0" / "training_parameters.json").write_text(json.dumps({**parameters, **change}))
        assert said in refused(f"--resume {folder}"), change


def test_what_a_killed_process_left_unfinished_is_removed(stopped, run):
    folder, whole = stopped
    for place in (folder, folder / "0", folder / "checkpoints"):
        (place / f"{atomic.PARTIAL}abc-results.pt").write_bytes(b"half")
    run(f"--resume {folder}", small=False)
    assert not differences(folder, whole)


def test_other_code_or_packages_are_told(stopped, run, capsys):
    folder, _ = stopped
    for path in folder.glob("*/training_parameters.json"):
        parameters = json.loads(path.read_text())
        parameters["versions"]["torch"], parameters["commit"] = "1.0", "abc"
        path.write_text(json.dumps(parameters))
    assert run(f"--resume {folder}", small=False).exit_code == 0
    said = capsys.readouterr().err
    assert "began with torch 1.0 and goes on with" in said and "began with commit abc" in said


# ---------------------------------------------------------------- archives


@pytest.mark.parametrize("kind", ["digits_rotations", "mnist_rotations", "mnist_permutations"])
def test_damaged_archives_are_never_silently_used(kind, tmp_path):
    """Forty truncated or flipped copies of each; benchmarks/faults.py has more."""
    data = tmp_path / "data"
    data.mkdir()
    archives = Archives(tmp_path, published_streams(data))
    if kind not in archives.files:
        pytest.skip("needs MNIST: uv run get_data.py mnist")
    archives.files = {kind: archives.files[kind]}
    for case in range(40 if kind != "mnist_permutations" else 8):
        folder = tmp_path / str(case)
        folder.mkdir()
        archives(case, folder, data)


def replaced(path, sound):
    path.unlink()
    path.write_bytes(sound[:-1])


def overwritten(path, sound):
    """In place, so that what is mapped into memory changes, and nothing else would tell."""
    with path.open("r+b") as file:
        file.seek(len(sound) // 4)
        file.write(bytes(len(sound) // 2))


@pytest.mark.parametrize("change", [replaced, overwritten])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_data_file_that_changes_while_it_is_used_is_noticed(task, change, run, tmp_path, monkeypatch, capsys):
    data = published_streams(tmp_path)
    line = f"--model er --dataset mnist_rotations --data_path {data} --seed 0"
    whole, begin = run(line), ER.begin_task
    sound = (data / "mnist_rotations.pt").read_bytes()

    def begin_task(self, t):
        begin(self, t)
        if t == task:
            change(data / "mnist_rotations.pt", sound)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ER, "begin_task", begin_task)
        run(line)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "mnist_rotations.pt was changed while it was in use" in message and "Traceback" not in message
    (folder,) = [path for path in whole.folder.parent.iterdir() if path != whole.folder]
    assert "completed" not in {run_folder.summary_of(folder).get("status")}
    torch.save(([[0, torch.rand(120, 784), torch.arange(120) % 10]] * 3,) * 2, data / "mnist_rotations.pt")
    with pytest.raises(SystemExit) as stop:
        run(f"--resume {folder}", small=False)
    assert stop.value.code == 2 and "began with other data" in capsys.readouterr().err
    (data / "mnist_rotations.pt").write_bytes(sound)
    assert not differences(run(f"--resume {folder}", small=False).folder, whole.folder)


def test_a_published_file_that_would_run_code_is_refused(tmp_path, refused):
    torch.save([[Evil(tmp_path / "sprung")]], tmp_path / "mnist_rotations.pt")
    assert "could run code" in refused(f"--dataset mnist_rotations --data_path {tmp_path}")
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------------------------------- the machine around it


@pytest.mark.parametrize("nth", [4, 7, 12])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(nth, run, monkeypatch, capsys):
    """No room for the n-th file that is written: a checkpoint, or a part of the record."""
    line = "--model er --seeds 0 1 --checkpoint_minutes 100"
    whole, put, calls = run(line), atomic.put, []

    def full(temporary, path):
        calls.append(path)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(temporary, path)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(atomic, "put", full)
        run(line)
    assert stop.value.code == 2
    said = [part for part in capsys.readouterr().err.splitlines() if part.startswith("main.py")]
    (folder,) = [path for path in whole.folder.parent.iterdir() if path != whole.folder]
    assert len(said) == 1 and "No space left" in said[0] and f"--resume {folder}" in said[0]
    assert not differences(run(f"--resume {folder}", small=False).folder, whole.folder)


def test_no_room_for_events_is_one_sentence_and_nothing_is_lost(run, monkeypatch, capsys):
    line = "--model er --seed 0"
    whole = run(line)

    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("utils.events.EventFile.sync", full)
        run(line)
    assert stop.value.code == 2
    assert "No space left" in capsys.readouterr().err
    (folder,) = [path for path in whole.folder.parent.iterdir() if path != whole.folder]
    assert not differences(run(f"--resume {folder}", small=False).folder, whole.folder)


def test_no_room_to_begin_leaves_nothing(run, monkeypatch, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "write_bytes", full)
    with pytest.raises(SystemExit) as stop:
        run("--model er --seed 0")
    assert stop.value.code == 2 and "--log_dir" in capsys.readouterr().err
    assert not [path for path in Path(run.log_dir).rglob("*") if path.name != "er"]


def test_a_folder_that_cannot_be_written_is_refused(stopped, tmp_path, monkeypatch, refused):
    folder, _ = stopped

    def readonly(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", readonly)
    message = refused(f"--log_dir {tmp_path}/other --seed 0")
    assert f"--log_dir {tmp_path}/other cannot be written" in message and "Read-only" in message
    message = refused(f"--resume {folder}")
    assert f"--resume {folder} cannot be written" in message and "Read-only" in message


def test_too_little_memory_on_the_device_is_one_sentence(run, monkeypatch, capsys):
    line, begin = "--model er --seed 0", ER.begin_task

    def begin_task(self, t):
        if t == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        begin(self, t)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ER, "begin_task", begin_task)
        run(line)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "more memory than --device cpu has" in message and "--batch_size" in message and "--resume auto" in message
    resumed = run(f"{line} --resume auto")
    assert json.loads((resumed.folder / "summary.json").read_text())["resumed_at_steps"] == [8]
    assert not differences(resumed.folder, run(line).folder)


@pytest.mark.parametrize("where", ["2>/dev/full", ">/dev/full", "2>&-", "2>&1 | head -c 10", "| true"])
def test_a_log_that_is_full_or_closed_does_not_end_a_run(where, tmp_path):
    line = f"{sys.executable} main.py --model online --n_tasks 2 --samples_per_task 40 --seed 0 --log_dir {tmp_path}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} {where}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(list(tmp_path.rglob("summary.json"))) == 1


# ---------------------------------------------------------------- what grows


def peak(tmp_path, tasks: int) -> int:
    """Bytes of the largest resident set of a run of so many tasks, in a process of its own."""
    line = f"--model er --n_tasks {tasks} --samples_per_task 60 --n_hiddens 16 --seeds 0 1 --log_dir {tmp_path}/{tasks}"
    subprocess.run([sys.executable, "main.py", *line.split()], cwd=ROOT, check=True, capture_output=True)
    (summary,) = (tmp_path / str(tasks)).rglob("summary.json")
    return json.loads(summary.read_text())["peak_memory_bytes"]


def test_memory_does_not_grow_with_the_number_of_tasks(tmp_path):
    """Peak memory of 100 tasks is within 10 % of that of 20."""
    few, many = peak(tmp_path, 20), peak(tmp_path, 100)
    assert many < 1.1 * few
    assert few > 5 * 10**7 and np.isfinite(few)
