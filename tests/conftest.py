from pathlib import Path

import numpy as np
import pytest
import torch

from dataloaders import image_sets
from main import main
from model.memory import Reservoir
from utils.record import Record

torch.set_num_threads(1)  # the networks are small: more threads only wait for each other

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(autouse=True)
def same_draws():
    """Every run of a test draws the same numbers: finite differences fail where a step crosses a ReLU's kink."""
    torch.manual_seed(0)


@pytest.fixture
def mnist_data():
    """The folder with real MNIST; tests that need it are skipped where it is not."""
    if not (DATA / "mnist" / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("needs MNIST: uv run get_data.py mnist")
    return DATA


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data folder with a small CIFAR-100 (20 training images per class) and a smaller TinyImageNet."""
    data = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, classes, side, counts in (("cifar100", 100, 32, (20, 4)), ("tinyimagenet", 200, 64, (4, 2))):
        colours = rng.integers(0, 200, (classes, 3, 1, 1))
        arrays = {}
        for split, n in zip(image_sets.SPLITS, counts, strict=True):
            labels = np.repeat(np.arange(classes), n)
            noise = rng.integers(0, 56, (len(labels), 3, side, side))
            arrays[split] = (colours[labels] + noise).astype(np.uint8), labels
        image_sets.write(data / name, [f"class{i}" for i in range(classes)], arrays)
    return data


@pytest.fixture
def run(tmp_path):
    """run("--model er ...") runs main.py on a small digits stream and returns its result."""

    def run(line: str = "", small: bool = True):
        size = "--n_tasks 3 --samples_per_task 40 --n_hiddens 16 --n_epochs 1 --batch_size 10 " if small else ""
        return main([*f"{size}--log_dir {run.log_dir} {line}".split()])

    run.log_dir = tmp_path / "logs"
    return run


@pytest.fixture
def quick_plots(monkeypatch):
    """Drawing takes longer than most runs of the tests; test_run.py and benchmarks/faults.py look at the plots."""
    monkeypatch.setattr("utils.plots.save", lambda path, figure: Path(path).write_bytes(b"plot"))
    for name in ("accuracy_matrix", "task_accuracy", "alignment", "by_length"):
        monkeypatch.setattr(f"utils.plots.{name}", lambda *args: None)


@pytest.fixture
def killed(run, monkeypatch):
    """killed(start, n) calls start(), which runs main.py; that dies at the n-th event. Returns the folder it leaves."""

    class Killed(BaseException):
        pass

    def killed(start, n: int) -> Path:
        before, add, left = set(run.log_dir.glob("*/*")), Record.add, [n]

        def die(record, event):
            add(record, event)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Record, "add", die)
            start()
        (folder,) = set(run.log_dir.glob("*/*")) - before
        return folder

    return killed


@pytest.fixture
def refused(capsys):
    """refused("--model nosuch") checks exit code 2 and one line on stderr, and returns that line."""

    def refused(line: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("main.py: ") and message.count("\n") == 1, message
        return message

    return refused


@pytest.fixture
def events(monkeypatch):
    """What the learner asked of its memory, in order: ("sample", batch or None) and ("add", batch)."""
    seen = []
    sample, add = Reservoir.sample, Reservoir.add

    def spy_sample(memory, n, **order):
        seen.append(("sample", drawn := sample(memory, n, **order)))
        return drawn

    def spy_add(memory, batch):
        seen.append(("add", batch))
        add(memory, batch)

    monkeypatch.setattr(Reservoir, "sample", spy_sample)
    monkeypatch.setattr(Reservoir, "add", spy_add)
    return seen
