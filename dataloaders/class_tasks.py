"""Streams whose tasks are groups of classes of one image set: CIFAR-100 and TinyImageNet."""

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from dataloaders import augmentation, class_orders
from dataloaders.image_sets import Files, ImageSet
from dataloaders.stream import EVALUATION_CHUNK, Split, Stream, StreamOptions
from utils.errors import UserError
from utils.options import option
from utils.random_streams import generator


@dataclasses.dataclass(frozen=True)
class ClassOptions(StreamOptions):
    """What streams of classes take."""

    n_tasks: int = option(0, "number of tasks; 0: as many as there are classes for", low=0, high=10_000)
    samples_per_task: int = option(
        -1,
        "training examples of each task before the validation part is taken off, drawn anew for every seed; 0 or less:"
        " all of them",
        low=-1,
    )
    increment: int = option(5, "classes of each task", low=1, high=10_000)
    class_order: str = option(
        "random",
        "which classes make which task: random follows the seed, as Python's random.shuffle; chrono is as they are"
        " numbered; old is the published loaders' fixed order (CIFAR-100: iCaRL's), super goes by CIFAR-100's"
        " superclasses; anything else is a file of the classes' numbers in the order in which they are learnt",
    )
    scenario: Literal["task", "class"] = option(
        "task",
        "task: only the outputs of an example's own task compete for it; class: those of all classes seen so far",
    )
    augment: bool = option(True, "crop, flip and (CIFAR-100) brighten training images at random")

    @property
    def wanted(self) -> int:
        return max(1, round(self.samples_per_task * (1 - self.validation))) if self.samples_per_task > 0 else -1

    def most(self, n: int) -> int:
        return round(n / (1 - self.validation))

    def classes_of(self, classes: int) -> int:
        """How many of the stream's classes are learnt."""
        return self.n_tasks * self.increment or classes

    def check_classes(self, name: str, classes: int, orders: dict) -> None:
        """UserError if the classes cannot be grouped as asked."""
        if classes % self.increment:
            raise UserError(
                f"--increment {self.increment} does not divide the {classes} classes of {name}: give 5, for example."
            )
        if self.increment == 1 and self.scenario == "task":
            raise UserError(
                "--increment 1 leaves a task a single class, which nothing competes with: give --increment 2 or more,"
                " or --scenario class."
            )
        if self.n_tasks > classes // self.increment:
            raise UserError(
                f"--n_tasks {self.n_tasks} needs more than the {classes} classes of {name} with --increment"
                f" {self.increment}: give at most {classes // self.increment}."
            )
        if self.class_order in ("old", "super") and self.class_order not in orders:
            raise UserError(f"--class_order {self.class_order} is not known for {name}: give random or chrono.")
        self.written_order(classes, orders)

    def written_order(self, classes: int, orders: dict) -> list[int] | None:
        """The order in the file that class_order is the path of, None if it is a name; UserError if there is none."""
        if self.class_order in ("random", "chrono", *orders):
            return None
        return class_orders.read(self.class_order, classes)


class ClassTasks(Stream):
    """Task t has the classes order[t * increment .. (t + 1) * increment - 1]; they are its labels, in that order.

    Args:
        name, options: as in the registry.
        images: the set, the same number of training examples of every class. files: that it is mapped from.
        complete: training images of each class in the data set as its authors published it; `images` may have fewer.
        orders: further class orders by name. mean, std: of each channel, fractions. brightness: of augmentation.

    With class_order "random" the tasks of every replica are its own. The validation part is the same for all.
    """

    scale = 255.0

    def __init__(
        self,
        name: str,
        options: ClassOptions,
        images: ImageSet,
        files: Files,
        complete: int,
        orders: dict,
        mean,
        std,
        brightness=0.0,
    ):
        super().__init__(name, options)
        self.n_classes, self.classes_per_task = len(images.classes), options.increment
        options.check_classes(name, self.n_classes, orders)
        there = len(images.images["train"]) // self.n_classes * options.increment
        if there < complete * options.increment and options.samples_per_task > there:
            self.notes.append(
                f"--samples_per_task {options.samples_per_task} is more than the {there} training images that a task"
                f" has in this part of {name}: all are used."
            )
            self.options = options = dataclasses.replace(options, samples_per_task=-1)
        self.scenario, self.augments, self.brightness = options.scenario, options.augment, brightness
        self.images, self._files, self.orders = images.images, files, orders
        self.fingerprint, self.input_shape = images.fingerprint, tuple(images.images["train"].shape[1:])
        if written := options.written_order(self.n_classes, orders):
            self.orders = {**orders, options.class_order: written}
            self.fingerprint = hashlib.sha256(f"{images.fingerprint} {written}".encode()).hexdigest()
        tasks = options.n_tasks or self.n_classes // options.increment
        self.task_names = [
            f"classes {t * options.increment} to {(t + 1) * options.increment - 1}" for t in range(tasks)
        ]
        shape = (-1, 1, 1)
        self.mean, self.std = (255 * torch.tensor(values).view(shape) for values in (mean, std))
        self.rows = {"test": self._rows("test")} | self._split(self._rows("train"))

    def _rows(self, split: str) -> Tensor:
        """[classes, n] int64: where the images of each class are."""
        return torch.arange(len(self.images[split])).view(self.n_classes, -1)

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        n, stream_seed = rows.shape[1], self.options.stream_seed
        self.options.check(self.name, n * self.classes_per_task)
        held_out = self.options.held_out(n)
        if self.options.validation and not held_out:
            raise UserError(
                f"--validation {self.options.validation} leaves a class of {self.name} without validation examples, of"
                f" {n}: give a larger fraction, or 0 for none."
            )
        drawn = [generator(stream_seed, "validation split", c).permutation(n) for c in range(self.n_classes)]
        order = torch.stack([torch.from_numpy(one) for one in drawn])
        kept = order[:, held_out:].sort(dim=1).values
        return {"train": rows.gather(1, kept), "validation": rows.gather(1, order[:, :held_out])}

    def order(self, seed: int) -> list[int]:
        """The classes in the order in which a replica learns them."""
        if self.options.class_order in self.orders:
            return self.orders[self.options.class_order]
        order = list(range(self.n_classes))
        if self.options.class_order == "random":
            random.Random(seed).shuffle(order)
        return order

    def refuse_changed(self) -> None:
        self._files.refuse_changed()

    def to(self, device) -> "ClassTasks":
        self.images = {split: images.to(device) for split, images in self.images.items()}
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def size(self, t: int, split: Split) -> int:
        return self.classes_per_task * self.rows[split].shape[1]

    def examples(self, t: int, split: Split, index: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        images, rows, labels = self._place(t, split, seed)
        if index is not None:
            rows, labels = rows[index.cpu()], labels[index.cpu()]
        return images[rows.to(images.device)], labels.to(images.device)

    def _place(self, t: int, split: Split, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """The images that a split's are among, and rows and labels [n] of those of task t."""
        first = t * self.classes_per_task
        classes = self.order(seed)[first : first + self.classes_per_task]
        rows = self.rows[split][classes]
        labels = torch.arange(first, first + self.classes_per_task)[:, None].expand_as(rows)
        return self.images["test" if split == "test" else "train"], rows.flatten(), labels.flatten()

    def to_float(self, x: Tensor) -> Tensor:
        """[..., channels, height, width] uint8, or float of the same range -> normalised."""
        return x.float().sub_(self.mean).div_(self.std)

    def to_train(self, x: Tensor, rngs) -> Tensor:
        if not self.augments:
            return self.to_float(x)
        x = augmentation.crop_and_flip(x, rngs)
        if self.brightness:
            x = augmentation.brighten(x, rngs, self.brightness)
        return self.to_float(x)

    def evaluation_for(self, t: int, split: Split, seeds) -> Iterator[tuple[Tensor, Tensor]]:
        places = [self._place(t, split, seed) for seed in seeds]
        images, rows, labels = places[0][0], *(torch.stack([place[i] for place in places]) for i in (1, 2))
        for some, y in zip(rows.split(EVALUATION_CHUNK, dim=1), labels.split(EVALUATION_CHUNK, dim=1), strict=True):
            yield self.to_float(images[some.to(images.device)]), y.to(images.device)

    def evaluation(self, t: int, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """As the replica of seed 0 has it."""
        return ((x[0], y[0]) for x, y in self.evaluation_for(t, split, (0,)))
