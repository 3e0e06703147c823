"""The stream of OML and ANML: a trajectory of classes, met one after the other, a few examples each, one at a time."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from dataloaders.image_sets import Files, ImageSet
from dataloaders.omniglot import CHARACTERS, DRAWINGS
from dataloaders.stream import EVALUATION_CHUNK, Split, Stream, StreamOptions
from utils.errors import UserError
from utils.options import option
from utils.random_streams import generator

#: Classes of the background and of the evaluation alphabets.
BACKGROUND, EVALUATION = CHARACTERS["train"], CHARACTERS["test"]


@dataclasses.dataclass(frozen=True)
class TrajectoryOptions(StreamOptions):
    """What a trajectory takes."""

    n_tasks: int = option(600, "classes of the trajectory, one after the other", low=1, high=10_000)
    samples_per_task: int = option(
        15, "images of each class that are learnt; the others of its 20 are held out", low=1, high=DRAWINGS - 1,
        flags=("shots",),
    )  # fmt: skip
    validation: float = option(
        0.2, "fraction of the background classes that meta-training never sees, to choose settings on", low=0, high=0.9
    )
    trajectory: Literal["test", "validation"] = option(
        "test",
        "classes that the trajectory is made of: test is those of the evaluation alphabets, validation those of the"
        " background alphabets that --validation keeps apart",
    )
    image_size: Literal["28", "84"] = option("28", "pixels a side: 28 as ANML, 84 as OML")

    @property
    def there(self) -> int:
        """Classes that a trajectory can be made of."""
        return EVALUATION if self.trajectory == "test" else self.held_out(BACKGROUND)

    def check(self, name: str, n: int) -> None:
        there = self.there
        if self.trajectory == "validation" and not there:
            raise UserError(
                f"--trajectory validation needs classes that meta-training does not see: give --validation 0.2, not"
                f" {self.validation}."
            )
        if self.n_tasks > there:
            raise UserError(
                f"--n_tasks {self.n_tasks} is more than the {there} {self.trajectory} classes of {name}: give at most"
                f" {there}."
            )
        if self.validation and not self.held_out(BACKGROUND):
            raise UserError(
                f"--validation {self.validation} keeps none of the {BACKGROUND} background classes apart: give a larger"
                " fraction, or 0 for none."
            )


class Trajectory(Stream):
    """Task t is the t-th class of a trajectory that each seed draws: which classes, in what order, which of their
    images are learnt, which are held out.

    All outputs compete for every image, and class t of the trajectory is output t. The train part of the image set is
    the background, of which a part that --stream_seed decides is kept for validation; the test part makes trajectories.

    background: raw images for meta-training, [classes, drawings, *input shape].
    """

    scenario = "class"

    def __init__(self, name: str, options: TrajectoryOptions, images: ImageSet, files: Files, n_classes: int):
        super().__init__(name, options)
        self._files, self.fingerprint, self.n_classes = files, images.fingerprint, n_classes
        self.task_names = [f"class {t + 1}" for t in range(options.n_tasks)]
        every = {split: one.unflatten(0, (-1, DRAWINGS)) for split, one in images.images.items()}
        self.input_shape = tuple(every["train"].shape[2:])
        order = generator(options.stream_seed, "validation split").permutation(len(every["train"]))
        kept = torch.from_numpy(order[options.held_out(len(order)) :]).sort().values
        others = torch.from_numpy(order[: options.held_out(len(order))]).sort().values
        self.background = every["train"][kept]
        self.pool = every["test"] if options.trajectory == "test" else every["train"][others]

    def to(self, device) -> "Trajectory":
        self.background, self.pool = self.background.to(device), self.pool.to(device)
        return self

    def refuse_changed(self) -> None:
        self._files.refuse_changed()

    def size(self, t: int, split: Split) -> int:
        return self.options.samples_per_task if split == "train" else DRAWINGS - self.options.samples_per_task

    def rows(self, t: int, split: Split, seed: int) -> Tensor:
        """Where the images of task t are, in the pool's [classes * drawings, ...]; [size]."""
        c = generator(seed, "trajectory").permutation(len(self.pool))[t]
        drawn = torch.from_numpy(generator(seed, "drawings", int(c)).permutation(DRAWINGS))
        shots = self.options.samples_per_task
        return c * DRAWINGS + (drawn[:shots] if split == "train" else drawn[shots:])

    def examples(self, t: int, split: Split, index: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        rows = self.rows(t, split, seed)
        if index is not None:
            rows = rows[index.cpu()]
        images = self.pool.flatten(0, 1)[rows.to(self.pool.device)]
        return images, torch.full((len(rows),), t, device=images.device)

    def evaluation_for(self, t: int, split: Split, seeds) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = (
            torch.stack(parts) for parts in zip(*(self.examples(t, split, seed=seed) for seed in seeds), strict=True)
        )
        for some_x, some_y in zip(x.split(EVALUATION_CHUNK, 1), y.split(EVALUATION_CHUNK, 1), strict=True):
            yield self.to_float(some_x), some_y
