"""Meta-BGD: the look-ahead objective of C-MAML, minimised by Bayesian gradient descent."""

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import clip_by_norm_
from model.lookahead import LookaheadMAML
from model.memory import ReplayOptions
from utils.options import option


class BayesianGradientDescent:
    """Bayesian gradient descent (Zeno et al. 2018, "Task agnostic continual learning using online variational Bayes").

    Every weight is a Gaussian of mean mu and standard deviation sigma. Losses are of weights drawn from it,

        w = mu + sigma * eps,    eps ~ N(0, 1),

    and after some draws, with g the gradient of the summed loss at w and E the mean over draws,

        mu    <- mu - eta * sigma^2 * E[g]
        sigma <- sigma * sqrt(1 + (sigma E[g eps] / 2)^2) - sigma^2 E[g eps] / 2

    (equations 10 and 11 there). With a = sigma E[g eps] / 2 the second line is sigma * (sqrt(1 + a^2) - a), which is
    computed as sigma / (sqrt(1 + a^2) + a) where a > 0: the difference would round to 0.

    Args:
        mean: mu [replicas, parameters], updated in place. std_init: sigma at the start. eta: see above.
    """

    def __init__(self, mean: Tensor, std_init: float, eta: float):
        self.mean, self.eta = mean, eta
        self.sigma = torch.full_like(mean, std_init)
        self._forget()

    def _forget(self) -> None:
        self._draws, self._gradient, self._product = 0, torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    def draw(self, rngs) -> Tensor:
        """Weights w [replicas, parameters], those of replica r drawn with rngs[r]."""
        noise = np.stack([rng.standard_normal(self.mean.shape[1], dtype=np.float32) for rng in rngs])
        self._noise = torch.from_numpy(noise).to(self.mean)
        return torch.addcmul(self.mean, self.sigma, self._noise)

    def add(self, gradient: Tensor) -> None:
        """Counts in the gradient g at the weights drawn last."""
        self._draws += 1
        self._gradient += gradient
        self._product.addcmul_(gradient, self._noise)

    def step(self) -> None:
        """Updates mu and sigma from the gradients counted in since the last step."""
        a = self.sigma * self._product / (2 * self._draws)
        self.mean.addcmul_(self.sigma.square(), self._gradient, value=-self.eta / self._draws)
        root = torch.sqrt(1 + a.square())
        self.sigma *= torch.where(a > 0, 1 / (root + a), root - a)
        self._forget()

    def state_dict(self) -> dict:
        return {"sigma": self.sigma}

    def load_state_dict(self, state: dict) -> None:
        if state["sigma"].shape != self.sigma.shape:
            raise ValueError(f"the saved sigma is {tuple(state['sigma'].shape)}, expected {tuple(self.sigma.shape)}")
        self.sigma.copy_(state["sigma"])


@dataclasses.dataclass(frozen=True)
class MetaBGDOptions(ReplayOptions):
    alpha_init: float = option(0.1, "rate of the inner steps", above=0)
    glances: int = option(1, "meta-updates per incoming batch", low=1, high=1_000_000)
    inner_steps: int = option(
        3, "inner steps the incoming batch is split into; 0 is one step per example", low=0, flags=("cifar_batches",)
    )
    second_order: bool = option(True, "differentiate through the inner gradients")
    grad_clip_norm: float = option(2.0, "largest L2 norm of each meta-gradient; 0 turns all clipping off", low=0)
    train_mc_iters: int = option(2, "weights drawn, and meta-gradients averaged, per update", low=1, high=10_000)
    std_init: float = option(0.02, "initial standard deviation of every weight", above=0)
    mean_eta: float = option(1.0, "eta, the factor on the steps of the means", above=0)
    bgd_scale: Literal["meta_set", "incoming"] = option(
        "meta_set",
        "a summed loss is the mean loss times the examples it is the mean of; the 2020 code multiplies by the size of"
        " the incoming batch only",
    )
    use_old_task_memory: bool = option(False, "replay only from what the memory held when the task began")
    snapshot: Literal["copy", "live"] = option(
        "copy", "what --use_old_task_memory keeps; live (which makes it do nothing) is what the 2020 code does"
    )
    sample_rates: bool = option(False, "also treat the inner rates as Gaussians and learn them, as the 2020 code does")
    inner_rates: Literal["relu", "raw"] = option("relu", "raw lets a rate drawn negative ascend, as the 2020 code")


class MetaBGD(LookaheadMAML):
    """For each glance at the incoming batch B, with BGD holding the weights' means (theta) and deviations:

        train_mc_iters times: draw weights w and examples M_k; g = clip(d/dw of the look-ahead meta-loss at w)
        one step of BGD with the g

    Predictions are those of the means. Reference: Meta-BGD of Gupta et al. 2020, section 5.
    """

    state = (*LookaheadMAML.state, "optimizer", "rate_optimizer")

    def __init__(self, network, options: MetaBGDOptions, seeds, **where):
        super().__init__(network, options, seeds, **where)
        self.optimizer = BayesianGradientDescent(self.weights, options.std_init, options.mean_eta)
        self.rate_optimizer = BayesianGradientDescent(self.rates, options.std_init, options.mean_eta)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.optimizer.mean, self.rate_optimizer.mean = self.weights, self.rates

    @property
    def learns_rates(self) -> bool:
        return self.options.sample_rates

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        o = self.options
        arrived = Batch.of(x, y, t)
        for glance in range(o.glances):
            for draw in range(o.train_mc_iters):
                weights = self.optimizer.draw(self.random["weight noise"])
                rates = self.rate_optimizer.draw(self.random["rate noise"]) if o.sample_rates else self.rates
                first = glance == draw == 0
                batch, meta = self._glance(arrived, first)
                loss, grad_weights, grad_rates = self._look_ahead(weights, rates, batch, meta, clamp=o.grad_clip_norm)
                scale = meta.size if o.bgd_scale == "meta_set" else batch.size
                self.optimizer.add(clip_by_norm_(grad_weights, o.grad_clip_norm).mul_(scale))
                if o.sample_rates:
                    self.rate_optimizer.add(grad_rates.mul_(scale))
                if first and self.epoch == 0:
                    self.memory.add(batch)
            self.optimizer.step()
            if o.sample_rates:
                self.rate_optimizer.step()
        return loss

    def named_parameters(self) -> dict[str, Tensor]:
        named = super().named_parameters()
        sigma = self.network.layout.named(self.optimizer.sigma)
        return {**named, **{f"sigma.{name}": tensor for name, tensor in sigma.items()}}
