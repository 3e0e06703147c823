"""The MNIST streams as the MER project published them: files mnist_*.pt, read as they are."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.image_sets import Files, file_digest
from dataloaders.stream import Split, Stream, StreamOptions
from utils import tensors
from utils.errors import UserError
from utils.random_streams import generator


class PublishedTasks(Stream):
    """A saved pair of lists (training tasks, test tasks), each task [descriptor, x float [n, 784] in 0..1, y [n]].

    Only the first options.n_tasks tasks are used. The validation part is drawn from each task's training examples.
    The file stays open, mapped into memory.
    """

    def __init__(self, name: str, options: StreamOptions, path: Path):
        super().__init__(name, options)
        self.device = torch.device("cpu")
        (train, test), self.fingerprint, self._mapped = _read(path)
        if options.n_tasks > len(train):
            raise UserError(
                f"--n_tasks {options.n_tasks} is more than the {len(train)} tasks of {path}: give at most that."
            )
        self.tasks = {"train": train[: options.n_tasks], "test": test[: options.n_tasks]}
        self.task_names = [str(task[0]) for task in self.tasks["train"]]
        x, y = self.tasks["train"][0][1:]
        self.input_shape = tuple(x.shape[1:])
        self.n_classes = 1 + max(int(task[2].max()) for task in self.tasks["train"])
        options.check(name, len(y))
        held_out = options.held_out(len(y))
        order = torch.from_numpy(generator(options.stream_seed, "validation split").permutation(len(y)))
        self.parts = {"train": order[held_out:].sort().values, "validation": order[:held_out]}

    def size(self, t: int, split: Split) -> int:
        return len(self.tasks["test"][t][2]) if split == "test" else len(self.parts[split])

    def examples(self, t: int, split: Split, index: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        _, x, y = self.tasks["test" if split == "test" else "train"][t]
        if split != "test":
            index = self.parts[split] if index is None else self.parts[split][index.cpu()]
        if index is not None:
            x, y = x[index], y[index]
        return x.to(self.device), y.to(self.device)

    def refuse_changed(self) -> None:
        if self._mapped:
            self._mapped.refuse_changed()

    def to(self, device) -> "PublishedTasks":
        """The file stays where it is (4 GB and more); only what is asked for moves."""
        self.device = torch.device(device)
        return self


def _read(path: Path):
    """The pair of lists; the SHA-256 of the file; the file, if it stays mapped into memory."""
    try:
        file = Files([path])
        digest = file_digest(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"its part {damaged} is damaged")
            content, mapped = tensors.load(path, mmap=True), True
        else:  # files of before torch 1.6 cannot be memory-mapped, and have no checksums
            content, mapped = tensors.load(path), False
        file.refuse_changed()
        (train, test) = content
        if not train or len(train) != len(test):
            raise ValueError("there are not as many test tasks as training tasks")
        for tasks in (train, test):
            if len({(*x.shape, *y.shape) for _, x, y in tasks}) > 1:
                raise ValueError("the tasks differ in size")
        for _, x, y in (*train, *test):
            sound = x.dim() == 2 and len(x) == len(y) > 0 and x.shape[1] == train[0][1].shape[1]
            if not sound or x.dtype != torch.float32 or y.dtype != torch.int64 or y.min() < 0:
                raise ValueError("a task is not [descriptor, float32 x [n, inputs], int64 y [n]]")
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a readable file of MNIST tasks ({reason}): remove it, and the stream is built from MNIST."
        ) from None
    return (train, test), digest, file if mapped else None
