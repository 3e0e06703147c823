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

from dataloaders import mnist, shifts
from dataloaders.published import PublishedTasks
from dataloaders.stream import ShiftedImages, Stream, StreamOptions
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

    build: (options, data_path) -> Stream. options: the dataclass. train_examples, n_classes: of each task. presets:
    defaults where they differ from it. published: name of a ready-made file that is used instead of `build` where it
    lies in data_path. gives_task: a learner is told which task an example is of, at test time too.
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

    def check(self, options: StreamOptions, data_path) -> None:
        """UserError if the tasks cannot be as asked, before any data are loaded (but for published files)."""
        if self.origin(data_path) != self.published:
            options.check(self.name, self.train_examples)

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
    )
}


def build_stream(dataset: Dataset, options: StreamOptions, data_path) -> Stream:
    """The stream, its data loaded; UserError if they are missing, damaged or too few."""
    dataset.check(options, data_path)
    if dataset.origin(data_path) == dataset.published:
        return PublishedTasks(dataset.name, options, Path(data_path) / dataset.published)
    return dataset.build(options, data_path)
