"""Look-ahead meta-learning: C-MAML, Sync La-MAML and La-MAML are one learner with three settings.

Gupta, Yadav, Paull: "La-MAML: Look-ahead Meta Learning for Continual Learning", NeurIPS 2020, Algorithm 1.
"""

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import clip_by_norm_, hessian_product, loss_and_gradient
from model.learner import Learner
from model.memory import ReplayOptions, Reservoir
from utils.options import option


@dataclasses.dataclass(frozen=True)
class LookaheadOptions(ReplayOptions):
    learn_lr: bool = option(True, "learn the per-parameter rates alpha")
    sync_update: bool = option(False, "step the weights with the fixed rate --opt_wt instead of the rates alpha")
    alpha_init: float = option(0.1, "initial value of every per-parameter rate alpha", above=0)
    opt_lr: float = option(0.1, "learning rate of the rates alpha", low=0)
    opt_wt: float = option(0.1, "learning rate of the weights when updates are synchronous", low=0)
    glances: int = option(5, "meta-updates per incoming batch", low=1, high=1_000_000)
    inner_steps: int = option(
        0, "inner steps the incoming batch is split into; 0 is one step per example", low=0, flags=("cifar_batches",)
    )
    second_order: bool = option(False, "differentiate through the inner gradients (second-order meta-gradients)")
    meta_loss: Literal["all", "last"] = option(
        "all",
        "inner steps after which the meta-loss is taken: all is the mean over them, as in every published run; last is"
        " the paper's Algorithm 1",
    )
    grad_clip_norm: float = option(2.0, "largest L2 norm of each meta-gradient; 0 turns all clipping off", low=0)
    inner_clip: bool = option(True, "also hold each number of an inner gradient within plus or minus --grad_clip_norm")
    inner_rates: Literal["relu", "raw"] = option(
        "relu", "raw lets a learned rate that has become negative ascend in the inner loop"
    )
    use_old_task_memory: bool = option(False, "replay only from what the memory held when the task began")
    snapshot: Literal["copy", "live"] = option(
        "copy",
        "what --use_old_task_memory keeps: a copy of the memory, or the live memory itself (which makes it do nothing),"
        " as the 2020 MNIST code",
    )


def look_ahead(
    network, weights, rates, chunks, meta, *, second_order=False, meta_loss="all", clamp=0.0, inner_rates="relu"
):
    """The meta-loss after SGD on `chunks`, one after the other, and its gradients.

        theta_0 = weights;  theta_k = theta_{k-1} - relu(rates) * clamp(grad l(theta_{k-1}; chunk_k))
        L = mean over k of l(theta_k; meta)          or, with meta_loss "last",  L = l(theta_K; meta)

    Args:
        weights, rates: [replicas, parameters].
        chunks: the K inner batches, list of Batch; meta: the Batch that the meta-loss is taken on.
        second_order, meta_loss, inner_rates: see LookaheadOptions.
        clamp: bound on the absolute value of each number of an inner gradient; 0 for none.

    Returns: L [replicas]; dL/dweights and dL/drates, [replicas, parameters] each. In first order the inner gradients
    count as constants.
    """
    derive = _second_order if second_order else _first_order
    return derive(network, weights, rates, chunks, meta, meta_loss == "all", clamp, inner_rates == "relu")


def _first_order(network, weights, rates, chunks, meta, every_step, clamp, relu):
    """With g_i the inner gradients and G_k = grad l(theta_k; meta), the closed forms are

    dL/dweights = mean_k G_k    and    dL/drates = - mean_k [ G_k * sum_{i<=k} g_i ],  0 where relu(rates) is flat.
    """
    step_rates = rates.relu() if relu else rates
    theta, gradient = weights.clone(), torch.empty_like(weights)
    travelled, grad_weights, grad_rates = (torch.zeros_like(weights) for _ in range(3))
    loss, terms = 0, 0
    for k, chunk in enumerate(chunks, start=1):
        loss_and_gradient(network, theta, chunk, out=gradient)
        travelled += gradient.clamp_(-clamp, clamp) if clamp else gradient
        torch.addcmul(weights, step_rates, travelled, value=-1, out=theta)
        if every_step or k == len(chunks):
            loss_k, _ = loss_and_gradient(network, theta, meta, out=gradient)
            loss, terms = loss + loss_k, terms + 1
            grad_weights += gradient
            grad_rates.addcmul_(gradient, travelled, value=-1)
    if relu:
        grad_rates *= rates > 0
    return loss / terms, grad_weights.div_(terms), grad_rates.div_(terms)


def _second_order(network, weights, rates, chunks, meta, every_step, clamp, relu):
    """Reverse accumulation through the steps, without a graph over all of them: with a_k = dL/dtheta_k,

    a_K = G_K;   a_{k-1} = G_{k-1} + a_k - H_k (r * c_k * a_k);   dL/dr = - sum_k a_k * clamp(g_k)

    where r are the rates of the steps, H_k is the Hessian of l(theta_{k-1}; chunk_k), c_k is 1 where the clamp let g_k
    through and 0 elsewhere, and dL/dtheta_0 = a_0 (G_0 = 0: the meta-loss is not taken before the first step).
    """
    step_rates = rates.relu() if relu else rates
    thetas, gradients = [weights], []
    for chunk in chunks:
        gradients.append(loss_and_gradient(network, thetas[-1], chunk)[1])
        step = gradients[-1].clamp(-clamp, clamp) if clamp else gradients[-1]
        thetas.append(torch.addcmul(thetas[-1], step_rates, step, value=-1))
    adjoint, gradient, grad_rates = (torch.zeros_like(weights) for _ in range(3))
    loss, terms, last = 0, 0, len(chunks)
    for k in range(last, 0, -1):
        if every_step or k == last:
            loss_k, _ = loss_and_gradient(network, thetas[k], meta, out=gradient)
            loss, terms, adjoint = loss + loss_k, terms + 1, adjoint.add_(gradient)
        step, vector = gradients[k - 1], step_rates * adjoint
        if clamp:
            vector = torch.ops.aten.hardtanh_backward(vector, step, -clamp, clamp)
            step.clamp_(-clamp, clamp)
        grad_rates.addcmul_(adjoint, step, value=-1)
        adjoint -= hessian_product(network, thetas[k - 1], chunks[k - 1], vector)
    if relu:
        grad_rates *= rates > 0
    return loss / terms, adjoint.div_(terms), grad_rates.div_(terms)


class LookaheadMAML(Learner):
    """Meta-learns weights (and per-parameter rates) so that steps on new examples do not raise the loss on old ones.

    For each glance at the incoming batch B, with M_k drawn from the reservoir:

        L, dL/dtheta, dL/dalpha = look_ahead(theta, alpha; inner steps on B; meta-loss on M_k + B)
        alpha <- alpha - opt_lr * clip(dL/dalpha)                      if learn_lr
        theta <- theta - opt_wt * clip(dL/dtheta)                      if sync_update
        theta <- theta - relu(alpha) * clip(dL/dtheta)                 otherwise, with the alpha just updated

    La-MAML: learn_lr. Sync La-MAML: learn_lr and sync_update. C-MAML: sync_update. Differences from the published code
    are options (docs/differences.md); --as_published sets them.
    """

    state = (*Learner.state, "rates", "memory")
    replays = True

    def __init__(self, network, options: LookaheadOptions, seeds, **where):
        super().__init__(network, options, seeds, **where)
        self.rates = torch.full_like(self.weights, options.alpha_init)
        self.memory = Reservoir(options.memories, self.random, options.reservoir, options.replacement)

    @property
    def learns_rates(self) -> bool:
        return self.options.learn_lr

    def begin_task(self, t: int) -> None:
        if self.options.use_old_task_memory and t > 0 and self.options.snapshot == "copy":
            self.memory.freeze()
        else:
            self.memory.thaw()

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        o = self.options
        arrived = Batch.of(x, y, t)
        for glance in range(o.glances):
            batch, meta = self._glance(arrived, glance == 0)
            clamp = o.grad_clip_norm if o.inner_clip else 0.0
            loss, grad_weights, grad_rates = self._look_ahead(
                self.weights, self.rates, batch, meta, meta_loss=o.meta_loss, clamp=clamp
            )
            if o.learn_lr:
                self.rates.sub_(clip_by_norm_(grad_rates, o.grad_clip_norm), alpha=o.opt_lr)
            clip_by_norm_(grad_weights, o.grad_clip_norm)
            self._step(grad_weights)
            if glance == 0 and self.epoch == 0:
                self.memory.add(batch)
        return loss

    def _step(self, gradient: Tensor, columns: slice = slice(None)) -> None:
        """Moves these columns of the weights along their meta-gradient."""
        weights, gradient = self.weights[:, columns], gradient[:, columns]
        if self.options.sync_update:
            weights.sub_(gradient, alpha=self.options.opt_wt)
        else:
            weights.addcmul_(self.rates[:, columns].relu(), gradient, value=-1)

    def _glance(self, arrived: Batch, first: bool) -> tuple[Batch, Batch]:
        """The batch in a fresh order, and with a fresh replay draw; the first glance at it is watched for alignment."""
        batch = arrived.take(self._orders(arrived))
        replayed = self.memory.sample(self.options.replay_batch_size)
        if self.alignment and first:
            self.alignment.add(self.network, self.weights, batch, replayed)
        return batch, batch + replayed

    def _look_ahead(self, weights: Tensor, rates: Tensor, batch: Batch, meta: Batch, **how):
        """look_ahead with inner steps on the parts of the batch, as the options say."""
        o = self.options
        how |= {"second_order": o.second_order, "inner_rates": o.inner_rates}
        return look_ahead(self.network, weights, rates, batch.split(o.inner_steps or batch.size), meta, **how)

    def _orders(self, batch: Batch) -> Tensor:
        """A fresh order of the batch for each replica, [replicas, batch]."""
        orders = np.stack([rng.permutation(batch.size) for rng in self.random["glance order"]])
        return torch.from_numpy(orders).to(batch.y.device)

    def named_parameters(self) -> dict[str, Tensor]:
        rates = {f"rate.{name}": tensor for name, tensor in self.network.layout.named(self.rates).items()}
        return {**super().named_parameters(), **rates}

    def statistics(self) -> dict[str, Tensor]:
        figures = super().statistics()
        if self.alignment and self.learns_rates:
            for name, rates in self.network.layout.named(self.rates).items():
                figures[f"rate_mean/{name}"] = rates.flatten(1).mean(dim=1)
                figures[f"rate_std/{name}"] = rates.flatten(1).std(dim=1, correction=0)
        return figures
