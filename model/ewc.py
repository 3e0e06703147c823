"""Elastic weight consolidation: weights that mattered for old tasks are held where they were."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import group_gradients, loss_and_gradient
from model.learner import Learner, the_task
from model.memory import RingOptions, TaskRings
from utils.options import option

#: Examples whose single gradients are held at once.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class EWCOptions(RingOptions):
    lr: float = option(0.01, "learning rate of SGD", above=0)
    memory_strength: float = option(10.0, "lambda, the weight of the penalty", low=0)
    fisher: Literal["mean_of_squares", "square_of_mean"] = option(
        "mean_of_squares",
        "importance of a weight: the mean over the kept examples of its squared gradient (the empirical Fisher"
        " information), or the square of its mean gradient, as MER's code",
    )
    keep: Literal["last", "first"] = option("last", "which examples of a task its importance is measured on")


class EWC(Learner):
    """theta <- theta - lr * [grad l(theta; B) + 2 lambda sum_{tasks k} F_k * (theta - theta_k)]

    F_k is the diagonal empirical Fisher information at theta_k, the weights at the end of task k, measured on the
    examples kept of the task: E[(d l / d theta)^2]. Kirkpatrick et al. 2017, equation 3, in MER's scaling (lambda
    without the factor 1/2). The sums over tasks of F_k and of F_k * theta_k are kept, so the cost of a step does not
    grow with the number of tasks.
    """

    state = (*Learner.state, "memory", "importance", "anchor")

    def __init__(self, network, options: EWCOptions, seeds, **where):
        super().__init__(network, options, seeds, **where)
        self.memory = TaskRings(options.n_memories)
        self.importance, self.anchor = torch.zeros_like(self.weights), torch.zeros_like(self.weights)

    def penalty_gradient(self) -> Tensor:
        """Gradient [replicas, parameters] of lambda * sum_k sum_i F_k,i (theta_i - theta_k,i)^2."""
        return (self.importance * self.weights).sub_(self.anchor).mul_(2 * self.options.memory_strength)

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        batch = Batch.of(x, y, t)
        loss, gradient = loss_and_gradient(self.network, self.weights, batch)
        self.weights.sub_(gradient.add_(self.penalty_gradient()), alpha=self.options.lr)
        if self.epoch == 0:
            self._remember(the_task(t), batch)
        return loss

    def _remember(self, t: int, batch: Batch) -> None:
        if list(self.memory.rings) != [t]:  # only the task being learnt is needed
            self.memory = TaskRings(self.options.n_memories)
        if self.options.keep == "first":
            room = self.options.n_memories - self.memory.filled(t)
            batch = Batch(*(part[:, :room] for part in batch))
        if batch.size:
            self.memory.add(t, batch)

    def end_task(self, t: int) -> None:
        if t in self.memory.rings:
            fisher = self._fisher(self.memory.of(t))
            self.importance += fisher
            self.anchor += fisher * self.weights

    def _fisher(self, kept: Batch) -> Tensor:
        """The importance of every weight, [replicas, parameters]."""
        if self.options.fisher == "square_of_mean":
            return loss_and_gradient(self.network, self.weights, kept)[1].square_()
        total = torch.zeros_like(self.weights)
        for part in kept.split(-(-kept.size // CHUNK)):
            total += group_gradients(self.network, self.weights, part, part.size).square_().sum(dim=1)
        return total.div_(kept.size)
