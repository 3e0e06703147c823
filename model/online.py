"""Stochastic gradient descent on whatever arrives: the floor (`online`) and, on mixed tasks, the ceiling (`iid`)."""

import dataclasses

from torch import Tensor

from model.batch import Batch
from model.gradients import loss_and_gradient
from model.learner import Learner
from utils.options import option


@dataclasses.dataclass(frozen=True)
class OnlineOptions:
    lr: float = option(0.01, "learning rate of SGD", above=0)


class Online(Learner):
    """theta <- theta - lr * grad l(theta; B), one step per incoming batch B; no memory, no clipping.

    Reference: "online" of Riemer et al. 2019, table 1. The registry's `iid` is the same learner on a stream whose
    tasks are mixed: the published iid2 (Gupta et al. 2020) draws batches from 4 random tasks, ours from all of them.
    """

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        loss, gradient = loss_and_gradient(self.network, self.weights, Batch.of(x, y, t))
        self.weights.sub_(gradient, alpha=self.options.lr)
        return loss
