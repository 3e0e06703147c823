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

    @property
    def wanted(self) -> int:
        """Examples that a replica is to train on in a task; 0 or less: all of them."""
        return self.samples_per_task

    def most(self, n: int) -> int:
        """The largest --samples_per_task where n examples are left to train on."""
        return n

    def check_samples(self, name: str, n: int) -> None:
        """UserError if fewer than --samples_per_task examples are left to train on, n of them."""
        if self.wanted > n:
            raise UserError(
                f"--samples_per_task {self.samples_per_task} is more than a task of {name} has to train on: give at"
                f" most {self.most(n)}."
            )


class Stream(abc.ABC):
    """Tasks 0 .. n_tasks-1, each with its own training, validation and test examples.

    Raw examples are uint8 or float tensors; `to_float` makes them the network's input.

    Attributes:
        name: as in the registry. scenario: "domain": all tasks share the same classes, and the task need not be known;
            "task": each has classes of its own, and the task is told when learning; "class": it is not.
        classes_per_task: outputs that belong to each task, one task's after the other's; 0 where all share them.
        input_shape: of one example. n_classes: outputs the network needs. task_names: one per task, for people.
        scale: raw uint8 values are divided by it. fingerprint: a digest of the data behind it, so that a run never goes
            on with others than it began with. background: raw images of classes for meta-training, [classes, n,
            *input_shape]; None: there are none. notes: sentences that the user should read.
    """

    name: str
    scenario = "domain"
    input_shape: tuple[int, ...]
    n_classes: int
    task_names: list[str]
    scale = 255.0
    fingerprint: str
    augments = False
    classes_per_task = 0

    def __init__(self, name: str, options: StreamOptions):
        self.name, self.options = name, options
        self.notes: list[str] = []
        self._kept: dict[tuple[int, Split], tuple[Tensor, Tensor]] = {}

    @property
    def n_tasks(self) -> int:
        return len(self.task_names)

    @abc.abstractmethod
    def examples(self, t: int, split: Split, index: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Raw examples [n, ...] of task t and their labels [n]; all of the split, or those at `index`.

        seed: of the replica, for streams whose tasks are not the same for all replicas.
        """

    @abc.abstractmethod
    def size(self, t: int, split: Split) -> int:
        """Number of examples that task t has in the split."""

    def refuse_changed(self) -> None:
        """UserError if files that the data are mapped from were changed since they were opened."""

    def to(self, device) -> "Stream":
        """Keeps the data on `device` from now on."""
        return self

    def to_float(self, x: Tensor) -> Tensor:
        """Raw examples of any shape -> float32 network input."""
        return x.float().div_(self.scale) if x.dtype == torch.uint8 else x

    def to_train(self, x: Tensor, rngs) -> Tensor:
        """Raw training examples [replicas, batch, ...] -> network input, augmented if the stream `augments`.

        rngs: one NumPy generator per replica, for nothing but this batch; none if the stream does not augment.
        """
        return self.to_float(x)

    def training_size(self, t: int) -> int:
        """Training examples of task t that a replica sees; UserError if there are fewer than were asked for."""
        pool, wanted = self.size(t, "train"), self.options.wanted
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

    def evaluation_for(self, t: int, split: Split, seeds) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for replicas side by side: x [replicas, n, *input_shape]; y [replicas or 1, n]."""
        for x, y in self.evaluation(t, split):
            yield x.expand(len(seeds), *x.shape), y[None]

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

    def examples(self, t: int, split: Split, index: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
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


def data_order(seed: int, phase: int, epoch: int, n: int) -> np.ndarray:
    """The order in which a replica meets the n training examples of a phase in an epoch, [n] int64."""
    return generator(seed, "data order", phase, epoch).permutation(n)


class TrainingSet:
    """The training examples of one phase of a stream, side by side for every replica.

    Args:
        stream: the stream.
        phase: its number, for the data order.
        tasks: the tasks whose examples are mixed in it; usually one.
        seeds: one per replica.
        batch_size: examples of each batch; the last of an epoch may be smaller.

    x: [replicas, n, ...] raw; y: [replicas, n]; t: [replicas, n], or an int where the phase is one task. UserError if
    the data were changed since they were opened.
    """

    def __init__(self, stream: Stream, phase: int, tasks: list[int], seeds, batch_size: int):
        self.stream, self.phase, self.seeds, self.batch_size = stream, phase, seeds, batch_size
        x, y, t = [], [], []
        for seed in seeds:
            parts = [stream.examples(task, "train", stream.chosen(task, seed), seed) for task in tasks]
            x.append(torch.cat([part[0] for part in parts]))
            y.append(torch.cat([part[1] for part in parts]))
            t.append(torch.cat([torch.full_like(part[1], task) for task, part in zip(tasks, parts, strict=True)]))
        self.x, self.y = torch.stack(x), torch.stack(y)
        self.t = tasks[0] if len(tasks) == 1 else torch.stack(t)
        self._order: tuple[int, tuple[Tensor, ...]] | None = None
        stream.refuse_changed()

    def __len__(self) -> int:
        return self.y.shape[1]

    def batch(self, epoch: int, number: int) -> tuple[Tensor, Tensor | int, Tensor]:
        """x, t, y, as `observe` takes them, of a batch of an epoch: what it is depends on nothing taken before.

        In an epoch every example comes once, in an order that each seed draws for it.
        """
        index = self._order_of(epoch)[number]
        replica = torch.arange(len(self.seeds), device=self.y.device)[:, None]
        seeds = self.seeds if self.stream.augments else ()
        rngs = [generator(seed, "augmentation", self.phase, epoch, number) for seed in seeds]
        t = self.t if isinstance(self.t, int) else self.t[replica, index]
        return self.stream.to_train(self.x[replica, index], rngs), t, self.y[replica, index]

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor | int, Tensor]]:
        """All batches of an epoch."""
        return (self.batch(epoch, number) for number in range(len(self._order_of(epoch))))

    def _order_of(self, epoch: int) -> tuple[Tensor, ...]:
        """The examples of each batch, [replicas, batch] int64."""
        if self._order is None or self._order[0] != epoch:
            orders = [data_order(seed, self.phase, epoch, len(self)) for seed in self.seeds]
            index = torch.from_numpy(np.stack(orders)).to(self.y.device)
            self._order = epoch, index.split(self.batch_size, dim=1)
        return self._order[1]
