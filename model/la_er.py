"""Look-ahead experience replay: ER whose per-parameter rates are learned by looking ahead."""

import dataclasses
from typing import Literal

from torch import Tensor

from model.batch import Batch
from model.gradients import clip_by_norm_, loss_and_gradient
from model.lookahead import LookaheadMAML
from model.memory import EpochReplayOptions
from utils.options import option


@dataclasses.dataclass(frozen=True)
class LaEROptions(EpochReplayOptions):
    alpha_init: float = option(0.1, "initial value of every per-parameter rate alpha", above=0)
    opt_lr: float = option(0.1, "learning rate of the rates alpha", low=0)
    glances: int = option(1, "updates per incoming batch", low=1, high=1_000_000)
    inner_steps: int = option(
        5, "inner steps the incoming batch is split into; 0 is one step per example", low=0, flags=("cifar_batches",)
    )
    second_order: bool = option(False, "differentiate through the inner gradients (second-order meta-gradients)")
    grad_clip_norm: float = option(2.0, "largest L2 norm of each gradient; 0 turns all clipping off", low=0)
    inner_clip: bool = option(True, "also hold each number of an inner gradient within plus or minus --grad_clip_norm")
    inner_rates: Literal["relu", "raw"] = option(
        "relu", "raw lets a learned rate that has become negative ascend in the inner loop, as the 2020 code"
    )


class LaER(LookaheadMAML):
    """Learns the rates as La-MAML does and the weights as ER does. For each glance at the incoming batch B:

        L, dL/dalpha = look_ahead(theta, alpha; inner steps on B; meta-loss on M_k + B after the last step)
        alpha <- alpha - opt_lr * clip(dL/dalpha)
        theta <- theta - relu(alpha) * clip(grad l(theta; M_k + B)),  with the alpha just updated

    and B is offered to the memory at the end. Reference: La-ER of Gupta et al. 2020, section 5.
    """

    @property
    def learns_rates(self) -> bool:
        return True

    def begin_task(self, t: int) -> None:
        pass

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        o = self.options
        arrived = Batch.of(x, y, t)
        for glance in range(o.glances):
            batch, meta = self._glance(arrived, glance == 0)
            clamp = o.grad_clip_norm if o.inner_clip else 0.0
            _, _, grad_rates = self._look_ahead(self.weights, self.rates, batch, meta, meta_loss="last", clamp=clamp)
            self.rates.sub_(clip_by_norm_(grad_rates, o.grad_clip_norm), alpha=o.opt_lr)
            loss, gradient = loss_and_gradient(self.network, self.weights, meta)
            self.weights.addcmul_(self.rates.relu(), clip_by_norm_(gradient, o.grad_clip_norm), value=-1)
        if o.remembers(self.epoch):
            self.memory.add(arrived)
        return loss
