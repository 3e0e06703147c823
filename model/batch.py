"""What learners pass around: examples with their labels and tasks, replicas first."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Labelled examples of every replica.

    x: [replicas, batch, *input shape], float; y: [replicas, batch], class; t: [replicas, batch], task. Both int64.
    """

    x: Tensor
    y: Tensor
    t: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, t) -> "Batch":
        """The batch of x and y, all of task t (int), or each example of its own task (tensor [replicas, batch])."""
        if x.shape[:2] != y.shape:
            raise ValueError(
                f"x is {tuple(x.shape)}, y {tuple(y.shape)}: expected [replicas, batch, ...], [replicas, batch]"
            )
        return cls(x, y, t if isinstance(t, Tensor) else torch.full_like(y, t))

    @property
    def size(self) -> int:
        """Examples per replica."""
        return self.y.shape[1]

    def __add__(self, other: "Batch | None") -> "Batch":
        """Both batches, one after the other, within each replica."""
        return self if other is None else Batch(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))

    def take(self, index: Tensor) -> "Batch":
        """The examples at index: [replicas, n], chosen separately in each replica."""
        replica = torch.arange(index.shape[0], device=index.device)[:, None]
        return Batch(*(part[replica, index] for part in self))

    def split(self, chunks: int) -> list["Batch"]:
        """`chunks` batches of sizes that differ by at most one (fewer when there are fewer examples)."""
        parts = (part.tensor_split(min(chunks, self.size), dim=1) for part in self)
        return [Batch(*chunk) for chunk in zip(*parts, strict=True)]
