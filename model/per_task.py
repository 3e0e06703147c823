"""Networks with weights of their own for every task: `independent` and `taskinput`."""

import dataclasses

import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import loss_and_gradient
from model.learner import Learner, the_task
from model.networks import Layout, Network
from utils.options import option


@dataclasses.dataclass(frozen=True)
class TaskInputOptions:
    lr: float = option(0.01, "learning rate of SGD", above=0)


@dataclasses.dataclass(frozen=True)
class IndependentOptions(TaskInputOptions):
    finetune: bool = option(True, "start the network of each task from that of the task before it")


class PerTask(Network):
    """One network per task, the last layers being common to all.

    Args:
        one: the network of one task. n_tasks: how many of it. own_layers: how many of its layers, counted from the
            input, each task has for itself; None: all.
    """

    def __init__(self, one: Network, n_tasks: int, own_layers: int | None):
        self.one, self.n_tasks, self.classes, self.heads = one, n_tasks, one.classes, one.heads
        shapes = list(one.layout.shapes.items())
        split = len(shapes) if own_layers is None else 2 * own_layers
        own, shared = shapes[:split], shapes[split:]
        self.own = Layout(dict(own)).parameters
        self.layout = Layout(
            {**{f"task{t}.{name}": shape for t in range(n_tasks) for name, shape in own}, **dict(shared)}
        )

    def initial_weights(self, rngs, dtype=torch.float32) -> Tensor:
        """[replicas, parameters]; the shared part is drawn first, so it does not depend on the number of tasks."""
        first = self.one.initial_weights(rngs, dtype)
        others = [self.one.initial_weights(rngs, dtype)[:, : self.own] for _ in range(self.n_tasks - 1)]
        return torch.cat([first[:, : self.own], *others, first[:, self.own :]], dim=1)

    def parts(self, weights: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Views of task t's own weights and of the shared ones, [replicas, ...]."""
        return weights[:, t * self.own : (t + 1) * self.own], weights[:, self.n_tasks * self.own :]


def independent_network(network: Network, n_tasks: int, options=None) -> PerTask:
    """All layers per task, 1/n_tasks of the hidden units or channels each (at least 1), as in MER's code."""
    return PerTask(network.narrowed(n_tasks), n_tasks, None)


def taskinput_network(network: Network, n_tasks: int, options=None) -> PerTask:
    """The first layer per task, the others shared."""
    return PerTask(network, n_tasks, 1)


class TaskInput(Learner):
    """theta_t <- theta_t - lr * grad l(theta_t; B), theta_t being the shared weights and those of B's task.

    Reference: "task input" of Riemer et al. 2019, table 1, after "multimodal" of Lopez-Paz and Ranzato 2017: every task
    has an input layer of its own. If the task is not told at test time, every class is scored by its own task's network
    (ours; where all tasks have the same classes, the task must be told).
    """

    network: PerTask

    def _weights_of(self, t: int) -> Tensor:
        return torch.cat(self.network.parts(self.weights, t), dim=1)

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        own, shared = self.network.parts(self.weights, the_task(t))
        loss, gradient = loss_and_gradient(self.network.one, self._weights_of(t), Batch.of(x, y, t))
        own.sub_(gradient[:, : self.network.own], alpha=self.options.lr)
        shared.sub_(gradient[:, self.network.own :], alpha=self.options.lr)
        return loss

    def predict(self, x: Tensor, t: int | None = None) -> Tensor:
        if t is None:
            return super().predict(x, None)
        with torch.no_grad():
            one = self.network.one
            return one.to_predict(one(self._weights_of(the_task(t)), x), t)

    def scores(self, x: Tensor) -> Tensor:
        """Each class as the network of its own task has it; ValueError where all tasks have the same classes."""
        if self.heads is None:
            raise ValueError("the task must be known where all tasks have the same classes")
        one = self.network.one
        with torch.no_grad():
            scores = one(self._weights_of(0), x)
            for t in range(1, self.network.n_tasks):
                scores[:, :, self.heads.outputs(t)] = one(self._weights_of(t), x)[:, :, self.heads.outputs(t)]
        return scores


class Independent(TaskInput):
    """The same with a small network for every task and nothing shared (Riemer et al. 2019, table 1).

    With finetune, task t starts from the weights of task t-1; learning it never changes those.
    """

    def begin_task(self, t: int) -> None:
        if self.options.finetune and t > 0:
            own, _ = self.network.parts(self.weights, t)
            own.copy_(self.network.parts(self.weights, t - 1)[0])
