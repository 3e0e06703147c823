"""Experience replay: learn from the incoming batch and remembered examples together."""

import dataclasses

from torch import Tensor

from model.batch import Batch
from model.gradients import clip_by_norm_, loss_and_gradient
from model.learner import Learner
from model.memory import EpochReplayOptions, Reservoir
from utils.options import option


@dataclasses.dataclass(frozen=True)
class EROptions(EpochReplayOptions):
    lr: float = option(0.1, "learning rate of SGD", above=0)
    glances: int = option(1, "updates per incoming batch", low=1, high=1_000_000)
    grad_clip_norm: float = option(
        0.0, "largest L2 norm of a gradient; 0 turns clipping off (MER's form; La-MAML's form clips at 2)", low=0
    )


class ER(Learner):
    """theta <- theta - lr * clip(grad l(theta; M_k + B)), M_k drawn from a reservoir; then B is offered to it.

    Reference: Riemer et al. 2019, Algorithm 4 (batches of 1, one glance, no clipping); the form of the La-MAML
    repository (batches of 10, several glances, clipped) is --glances and --grad_clip_norm.
    """

    state = (*Learner.state, "memory")
    replays = True

    def __init__(self, network, options: EROptions, seeds, **where):
        super().__init__(network, options, seeds, **where)
        self.memory = Reservoir(options.memories, self.random, options.reservoir, options.replacement)

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        o = self.options
        batch = Batch.of(x, y, t)
        for glance in range(o.glances):
            replayed = self.memory.sample(o.replay_batch_size)
            if self.alignment and glance == 0:
                self.alignment.add(self.network, self.weights, batch, replayed)
            together = batch + replayed
            weighting = self._weighting(together)
            loss, gradient = loss_and_gradient(self.network, self.weights, together, weighting=weighting)
            self.weights.sub_(clip_by_norm_(gradient, o.grad_clip_norm), alpha=o.lr)
        if o.remembers(self.epoch):
            self.memory.add(batch)
        return loss

    def _weighting(self, batch: Batch) -> Tensor | None:
        """The weight of each example in the loss, [replicas, batch]; None for the mean."""
        return None


class ERTasks(ER):
    """ER whose loss is the sum, over the tasks in M_k + B, of the mean loss on each task's examples.

    Reference: Riemer et al. 2019, Algorithm 5. A task of which few examples were drawn weighs as much as any other.
    """

    def _weighting(self, batch: Batch) -> Tensor:
        same = batch.t[:, :, None] == batch.t[:, None, :]
        return 1 / same.sum(dim=2).to(self.weights.dtype)
