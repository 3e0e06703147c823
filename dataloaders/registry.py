"""Every stream by name: what builds it, what it takes, and where the data come from."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dataloaders import cifar100, class_orders, mnist, omniglot, shifts, tinyimagenet
from dataloaders.class_tasks import ClassOptions, ClassTasks
from dataloaders.published import PublishedTasks
from dataloaders.stream import ShiftedImages, Stream, StreamOptions
from dataloaders.trajectories import Trajectory, TrajectoryOptions
from utils.errors import UserError
from utils.options import option

DIGITS = Path(__file__).parent / "digits" / "digits.npz"
DIGITS_SHA256 = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"

MER = "Riemer et al. 2019, after Lopez-Paz and Ranzato 2017; images: LeCun, Cortes, Burges"


@dataclasses.dataclass(frozen=True)
class RotationOptions(StreamOptions):
    interpolation: Literal["bilinear", "nearest"] = option(
        "bilinear",
        "how rotated pixels are found; nearest is what GEM's generator does (docs/results.md shows what that changes)",
    )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One row of the registry.

    build: (options, data_path) -> Stream. options: the dataclass. train_examples: of each task, or of each class where
    tasks have classes of their own; 0 if that depends on what was imported. n_classes: outputs of the network. presets:
    defaults where they differ from the options' own. published: name of a ready-made file that is used instead of
    `build` where it lies in data_path. gives_task: a learner is told which task an example is of, at test time too.
    orders: named orders of the classes. meta_trains: whether it has classes for meta-training.
    """

    name: str
    build: Callable[[StreamOptions, str], Stream]
    options: type
    summary: str
    citation: str
    train_examples: int
    n_classes: int
    presets: dict = dataclasses.field(default_factory=dict)
    published: str = ""
    gives_task: bool = True
    orders: dict = dataclasses.field(default_factory=dict)
    meta_trains: bool = False

    @property
    def images(self) -> bool:
        """Whether its examples are images, rather than flat."""
        return issubclass(self.options, ClassOptions | TrajectoryOptions)

    def check(self, options: StreamOptions, data_path) -> None:
        """UserError if the tasks cannot be as asked, before any data are loaded (but for published files)."""
        of_task = self.train_examples
        if isinstance(options, ClassOptions):
            options.check_classes(self.name, self.n_classes, self.orders)
            of_task *= options.increment
        if of_task and self.origin(data_path) != self.published:
            options.check(self.name, of_task)

    def origin(self, data_path) -> str:
        """Where the stream's data come from: computed here, or the published file."""
        found = self.published and os.path.exists(Path(data_path) / self.published)
        return self.published if found else "computed"


def _digits_rotations(options: RotationOptions, data_path) -> Stream:
    content = DIGITS.read_bytes()
    if hashlib.sha256(content).hexdigest() != DIGITS_SHA256:
        raise UserError(f"{DIGITS} is not the original (its SHA-256 differs): restore it from the repository.")
    with np.load(io.BytesIO(content)) as saved:
        images, labels = torch.from_numpy(saved["images"]) * 15, torch.from_numpy(saved["labels"])
    test = torch.arange(len(labels)) % 3 == 0
    names, moves = shifts.rotations(options.n_tasks, 8, options.interpolation, options.stream_seed)
    parts = (images[~test], labels[~test]), (images[test], labels[test])
    return ShiftedImages("digits_rotations", options, *parts, names, moves, scale=240.0)


def _mnist(name: str, shifts_of: Callable) -> Callable[[StreamOptions, str], Stream]:
    def build(options: StreamOptions, data_path) -> Stream:
        images = mnist.load(data_path)
        return ShiftedImages(name, options, images["train"], images["test"], *shifts_of(options))

    return build


def _cifar100(options: ClassOptions, data_path) -> Stream:
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    return ClassTasks("cifar100", options, *cifar100.load(data_path), 500, class_orders.CIFAR100, mean, std, 63 / 255)


def _tinyimagenet(options: ClassOptions, data_path) -> Stream:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return ClassTasks("tinyimagenet", options, *tinyimagenet.load(data_path), 500, class_orders.TINYIMAGENET, mean, std)


def _omniglot(options: TrajectoryOptions, data_path) -> Stream:
    return Trajectory("omniglot", options, *omniglot.load(data_path, int(options.image_size)), 1000)


def _rotated(options: RotationOptions):
    return shifts.rotations(options.n_tasks, 28, options.interpolation, options.stream_seed)


def _permuted(options: StreamOptions):
    return shifts.permutations(options.n_tasks, 784, options.stream_seed)


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "digits_rotations",
            _digits_rotations,
            RotationOptions,
            "10 rotations (0 to 180 degrees) of 1,797 handwritten 8 x 8 digits; in the repository, needs no download",
            "Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits",
            1198,
            10,
            {"n_tasks": 10, "samples_per_task": 300},
        ),
        Dataset(
            "mnist_rotations",
            _mnist("mnist_rotations", _rotated),
            RotationOptions,
            "20 rotations of MNIST, one random angle in each bin of 9 degrees",
            MER,
            60000,
            10,
            {"samples_per_task": 1000},
            published="mnist_rotations.pt",
        ),
        Dataset(
            "mnist_permutations",
            _mnist("mnist_permutations", _permuted),
            StreamOptions,
            "20 random pixel permutations of MNIST",
            MER,
            60000,
            10,
            {"samples_per_task": 1000},
            published="mnist_permutations.pt",
        ),
        Dataset(
            "mnist_manypermutations",
            _mnist("mnist_manypermutations", _permuted),
            StreamOptions,
            "100 random pixel permutations of MNIST, few examples each",
            MER,
            60000,
            10,
            {"n_tasks": 100, "samples_per_task": 200},
            published="mnist_manypermutations.pt",
        ),
        Dataset(
            "cifar100",
            _cifar100,
            ClassOptions,
            "20 tasks of 5 classes of CIFAR-100",
            "Gupta et al. 2020; images: Krizhevsky 2009",
            500,
            100,
            {"arch": "pc_cnn"},
            orders=class_orders.CIFAR100,
        ),
        Dataset(
            "tinyimagenet",
            _tinyimagenet,
            ClassOptions,
            "40 tasks of 5 classes of TinyImageNet",
            "Gupta et al. 2020; images: Stanford CS231n, from ImageNet",
            0,
            200,
            {"arch": "pc_cnn"},
            orders=class_orders.TINYIMAGENET,
        ),
        Dataset(
            "omniglot",
            _omniglot,
            TrajectoryOptions,
            "meta-training on Omniglot's background alphabets, then 600 characters of the others, 15 images each",
            "Javed and White 2019, Beaulieu et al. 2020; images: Lake, Salakhutdinov, Tenenbaum 2015",
            omniglot.DRAWINGS,
            1000,
            {
                "arch": "anml_cnn",
                "channels": 256,
                "batch_size": 1,
                "evaluate_tasks": "new",
                "evaluate_after": (10, 50, 75, 100, 200, 300, 400, 600),
            },
            gives_task=False,
            meta_trains=True,
        ),
    )
}


def build_stream(dataset: Dataset, options: StreamOptions, data_path) -> Stream:
    """The stream, its data loaded; UserError if they are missing, damaged or too few."""
    dataset.check(options, data_path)
    if dataset.origin(data_path) == dataset.published:
        return PublishedTasks(dataset.name, options, Path(data_path) / dataset.published)
    return dataset.build(options, data_path)
