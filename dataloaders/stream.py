"""A stream of tasks: what every data set becomes."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.options import option
from utils.random_streams import generator

Split = Literal["train", "validation", "test"]

#: Examples evaluated at once; bounds the memory that evaluation takes.
EVALUATION_CHUNK = 1000

#: Shifted evaluation images are kept, as uint8, up to this many bytes; beyond it they are computed at every evaluation.
EVALUATION_CACHE_BYTES = 200_000_000


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What every stream takes."""

    n_tasks: int = option(20, "number of tasks", low=1, high=10_000)
    samples_per_task: int = option(
        -1, "training examples of each task, drawn anew for every seed; 0 or less: all of them", low=-1
    )
    validation: float = option(
        0.0, "fraction of the training data kept apart for validation, never trained on", low=0, high=0.9
    )
    stream_seed: int = option(
        0, "decides what the tasks are (angles, permutations, the validation part); the same for all seeds", low=0
    )

    def held_out(self, n: int) -> int:
        """How many of n training examples are kept apart for validation."""
        return int(n * self.validation)

    def check(self, name: str, n: int) -> None:
        """UserError if a task of the stream, with n training examples, cannot be split as asked."""
        if self.validation and not self.held_out(n):
            raise UserError(
                f"--validation {self.validation} leaves no validation examples: give a larger fraction, or 0 for none."
            )
        self.check_samples(name, n - self.held_out(n))

    def check_samples(self, name: str, n: int) -> None:
        """UserError if fewer than --samples_per_task examples are left to train on, n of them."""
        if self.samples_per_task > n:
            raise UserError(
                f"--samples_per_task {self.samples_per_task} is more than a task of {name} has to train on: give at"
                f" most {n}."
            )


class Stream(abc.ABC):
    """Tasks 0 .. n_tasks-1, each with its own training, validation and test examples.

    Raw examples are uint8 or float tensors; `to_float` makes them the network's input.

    Attributes:
        name: as in the registry. scenario: "domain": all tasks share the same classes, and the task need not be known.
        input_shape: of one example. n_classes: outputs the network needs. task_names: one per task, for people.
        scale: raw uint8 values are divided by it. fingerprint: a digest of the data behind it, so that a run never goes
            on with others than it began with.
    """

    name: str
    scenario = "domain"
    input_shape: tuple[int, ...]
    n_classes: int
    task_names: list[str]
    scale = 255.0
    fingerprint: str

    def __init__(self, name: str, options: StreamOptions):
        self.name, self.options = name, options
        self._kept: dict[tuple[int, Split], tuple[Tensor, Tensor]] = {}

    @property
    def n_tasks(self) -> int:
        return len(self.task_names)

    @abc.abstractmethod
    def examples(self, t: int, split: Split, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw examples [n, ...] of task t and their labels [n]; all of the split, or those at `index`."""

    @abc.abstractmethod
    def size(self, t: int, split: Split) -> int:
        """Number of examples that task t has in the split."""

    def to(self, device) -> "Stream":
        """Keeps the data on `device` from now on."""
        return self

    def to_float(self, x: Tensor) -> Tensor:
        """Raw examples of any shape -> float32 network input."""
        return x.float().div_(self.scale) if x.dtype == torch.uint8 else x

    def training_size(self, t: int) -> int:
        """Training examples of task t that a replica sees; UserError if there are fewer than were asked for."""
        pool, wanted = self.size(t, "train"), self.options.samples_per_task
        self.options.check_samples(self.name, pool)
        return wanted if wanted > 0 else pool

    def chosen(self, t: int, seed: int) -> Tensor:
        """Which of them the replica of this seed sees, [training_size] int64; a fresh choice for every task."""
        pool, wanted = self.size(t, "train"), self.training_size(t)
        if wanted == pool:
            return torch.arange(pool)
        return torch.from_numpy(generator(seed, "samples", t).choice(pool, wanted, replace=False))

    def evaluation(self, t: int, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Float examples [n, *input_shape] and labels [n] of task t, chunk after chunk, every example once."""
        x, y = self._kept.get((t, split)) or self._examine(t, split)
        for some_x, some_y in zip(x.split(EVALUATION_CHUNK), y.split(EVALUATION_CHUNK), strict=True):
            yield self.to_float(some_x), some_y

    def _examine(self, t: int, split: Split) -> tuple[Tensor, Tensor]:
        examples = self.examples(t, split)
        if sum(x.nbytes for x, _ in [*self._kept.values(), examples]) <= EVALUATION_CACHE_BYTES:
            self._kept[t, split] = examples
        return examples


class ShiftedImages(Stream):
    """One labelled image set, seen by every task through its own shift (see dataloaders/shifts.py).

    Args:
        name, options: as in the registry.
        train, test: pairs of images [n, height, width] uint8 and labels [n].
        task_names, shifts: one per task.
        scale: value of a full pixel.
    """

    def __init__(
        self, name: str, options: StreamOptions, train, test, task_names: list[str], shifts: list, scale: float = 255.0
    ):
        super().__init__(name, options)
        self.task_names, self.shifts, self.scale = task_names, shifts, scale
        self.fingerprint = _digest(*train, *test)
        images, labels = train
        self.input_shape, self.n_classes = (images[0].numel(),), int(labels.max()) + 1
        held_out = options.held_out(len(labels))
        order = torch.from_numpy(generator(options.stream_seed, "validation split").permutation(len(labels)))
        self.splits = {"train": train, "validation": (images[order[:held_out]], labels[order[:held_out]]), "test": test}
        if held_out:
            kept = order[held_out:].sort().values
            self.splits["train"] = images[kept], labels[kept]

    def to(self, device) -> "ShiftedImages":
        self.splits = {split: (x.to(device), y.to(device)) for split, (x, y) in self.splits.items()}
        return self

    def size(self, t: int, split: Split) -> int:
        return len(self.splits[split][1])

    def examples(self, t: int, split: Split, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        images, labels = self.splits[split]
        if index is not None:
            index = index.to(labels.device)
            images, labels = images[index], labels[index]
        return self.shifts[t](images), labels.long()


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy())
    return digest.hexdigest()


class TrainingSet:
    """The training examples of one phase of a stream, side by side for every replica.

    Args:
        stream: the stream.
        phase: its number, for the data order.
        tasks: the tasks whose examples are mixed in it; usually one.
        seeds: one per replica.

    x: [replicas, n, ...] raw; y: [replicas, n]; t: [replicas, n], or an int where the phase is one task.
    """

    def __init__(self, stream: Stream, phase: int, tasks: list[int], seeds):
        self.stream, self.phase, self.seeds = stream, phase, seeds
        x, y, t = [], [], []
        for seed in seeds:
            parts = [stream.examples(task, "train", stream.chosen(task, seed)) for task in tasks]
            x.append(torch.cat([part[0] for part in parts]))
            y.append(torch.cat([part[1] for part in parts]))
            t.append(torch.cat([torch.full_like(part[1], task) for task, part in zip(tasks, parts, strict=True)]))
        self.x, self.y = torch.stack(x), torch.stack(y)
        self.t = tasks[0] if len(tasks) == 1 else torch.stack(t)

    def __len__(self) -> int:
        return self.y.shape[1]

    def order(self, epoch: int, batch_size: int) -> tuple[Tensor, ...]:
        """Which examples each batch of an epoch takes, [replicas, batch] int64: every one once, as each seed draws."""
        orders = np.stack(
            [generator(seed, "data order", self.phase, epoch).permutation(len(self)) for seed in self.seeds]
        )
        return torch.from_numpy(orders).to(self.y.device).split(batch_size, dim=1)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor | int, Tensor]:
        """x, t, y, as `observe` takes them, of the examples at index [replicas, batch]."""
        replica = torch.arange(len(self.seeds), device=self.y.device)[:, None]
        t = self.t if isinstance(self.t, int) else self.t[replica, index]
        return self.stream.to_float(self.x[replica, index]), t, self.y[replica, index]

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor | int, Tensor]]:
        """All batches of an epoch."""
        return map(self.take, self.order(epoch, batch_size))
