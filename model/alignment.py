"""Gradient alignment: do new and old examples pull the weights the same way?

La-MAML's objective (Gupta et al. 2020, section 3) rewards weights at which the gradients of the old and the new tasks
have a positive inner product; this measures that product while a learner learns.
"""

import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import loss_and_gradient


class GradientAlignment:
    """Running means, over observed batches, of cosine and dot product of two gradients at the same weights.

    One is of the incoming batch, the other of the examples replayed beside it. Draws no random numbers and changes no
    weights: a learner that is watched learns the same.
    """

    def __init__(self, replicas: int):
        self.replicas = replicas
        self.reset()

    def reset(self) -> None:
        self.count = 0
        self.sums = torch.zeros(2, self.replicas)

    def add(self, network, weights: Tensor, new: Batch, replayed: Batch | None) -> None:
        """Counts one observed batch in, unless nothing was replayed."""
        if replayed is None:
            return
        _, g_new = loss_and_gradient(network, weights, new)
        _, g_old = loss_and_gradient(network, weights, replayed)
        dot = (g_new * g_old).sum(dim=1)
        cosine = torch.cosine_similarity(g_new, g_old, dim=1)
        self.sums = self.sums.to(dot) + torch.stack([cosine, dot])
        self.count += 1

    def state_dict(self) -> dict:
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.sums = state["count"], state["sums"].clone()

    def means(self) -> dict[str, Tensor]:
        """gradient_cosine and gradient_dot_product, [replicas] each, since the last reset; nan while nothing counts."""
        means = self.sums / self.count if self.count else torch.full_like(self.sums, torch.nan)
        return {"gradient_cosine": means[0], "gradient_dot_product": means[1]}
