"""Gradient episodic memory: steps that do not, to first order, raise the loss on what is remembered of old tasks."""

import dataclasses
from typing import Literal

import numpy as np
import quadprog
import scipy.optimize
import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import clip_by_norm_, group_gradients, loss_and_gradient
from model.learner import Learner, the_task
from model.memory import Earlier, RingOptions, TaskRings
from utils.options import option

#: What is added to the diagonal of the Gram matrix: "relative" is this fraction of its mean, "absolute" this number.
RIDGES = {"relative": 1e-6, "absolute": 1e-3}

#: Rings of up to this many examples: inner products of gradients are taken without the gradients (about equal at 10).
SMALL_RING = 10


@dataclasses.dataclass(frozen=True)
class _ProjectionOptions(RingOptions):
    lr: float = option(0.01, "learning rate of SGD", above=0)
    glances: int = option(1, "updates per incoming batch", low=1, high=1_000_000)
    grad_clip_norm: float = option(
        0.0,
        "largest L2 norm of each gradient, before the projection; 0 turns clipping off (La-MAML's form clips)",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class GEMOptions(_ProjectionOptions):
    memory_strength: float = option(0.0, "margin: lower bound of every task's multiplier in the programme", low=0)
    solver: Literal["quadprog", "nnls"] = option(
        "quadprog", "what solves the quadratic programme: Goldfarb-Idnani, or SciPy's non-negative least squares"
    )
    ridge: Literal["relative", "absolute"] = option(
        "relative",
        "what keeps the programme positive definite: 1e-6 of the mean of the diagonal, or 1e-3 whatever the scale of"
        " the gradients, as the 2020 code",
    )


@dataclasses.dataclass(frozen=True)
class AGEMOptions(_ProjectionOptions):
    replay_batch_size: int = option(
        256, "remembered examples that the reference gradient is taken on", low=1, high=10**6
    )
    reference: Literal["memory_batch", "task_mean"] = option(
        "memory_batch",
        "gradient on a random batch of the memory, or the mean over old tasks of the gradient on all that is kept of"
        " each, as the 2020 code",
    )
    protect_first_task: bool = option(True, "off: the first task is left out of the memory, as in the 2020 code")


def multipliers(gram: np.ndarray, inner: np.ndarray, margin: float, ridge: float, solver: str) -> np.ndarray:
    """The dual of GEM's projection: argmin_v 1/2 v' (P + ridge I) v + q' v  subject to  v >= margin.

    Lopez-Paz and Ranzato 2017, equation 11. The programme is always feasible and, with ridge > 0, strictly convex. If
    the solver gives up all the same (a Gram matrix so ill-scaled that rounding eats the ridge), non-negative least
    squares on its eigenvalues, held at or above the ridge, take over. Numbers that are not finite, a Gram matrix of
    zeros, or a programme that both give up yield zeros: no projection.

    Args:
        gram: P [tasks, tasks], inner products of the memory gradients; inner: q [tasks], theirs with the new gradient.

    Returns: v [tasks], float64.
    """
    none = np.zeros(len(inner))
    gram, inner = np.asarray(gram, np.float64), np.asarray(inner, np.float64)
    scale = np.trace(gram) / len(inner)
    if not (np.isfinite(gram).all() and np.isfinite(inner).all()) or scale <= 0:
        return none
    gram, inner, ridge = (gram + gram.T) / (2 * scale), inner / scale, ridge / scale
    eye, bounds = np.eye(len(inner)), np.full(len(inner), float(margin))
    try:
        if solver == "quadprog":
            found = quadprog.solve_qp(gram + ridge * eye, -inner, eye, bounds)[0]
            if np.isfinite(found).all():
                return np.maximum(found, margin)
        return margin + _nnls(gram, inner + (gram + ridge * eye) @ bounds, ridge)
    except ValueError:
        return multipliers(gram, inner, margin, ridge, "nnls") if solver == "quadprog" else none
    except (RuntimeError, np.linalg.LinAlgError):
        return none


def _nnls(gram: np.ndarray, linear: np.ndarray, ridge: float) -> np.ndarray:
    """argmin_u 1/2 u' (P + ridge I) u + linear' u, u >= 0, as the least squares |A u - b| with A'A = P + ridge I."""
    values, vectors = np.linalg.eigh(gram)
    roots = np.sqrt(np.maximum(values, 0) + ridge)
    return scipy.optimize.nnls(roots[:, None] * vectors.T, -(vectors.T @ linear) / roots)[0]


def solve(gram: Tensor, inner: Tensor, options: GEMOptions) -> Tensor | None:
    """The multipliers v [replicas, tasks] of every replica with a negative inner product, zeros elsewhere; None if no
    replica has one. gram: [replicas, tasks, tasks]; inner: [replicas, tasks].
    """
    violated = (inner < 0).any(dim=1).tolist()
    if not any(violated):
        return None
    grams, products = (part.double().cpu().numpy() for part in (gram, inner))
    v = np.zeros(inner.shape)
    for r in np.flatnonzero(violated):
        ridge = RIDGES[options.ridge] * (np.trace(grams[r]) / len(grams[r]) if options.ridge == "relative" else 1)
        v[r] = multipliers(grams[r], products[r], options.memory_strength, ridge, options.solver)
    return torch.from_numpy(v).to(inner)


def project(gradient: Tensor, memory: Tensor, options: GEMOptions) -> Tensor:
    """gradient + sum_k v_k memory_k, in every replica where some memory gradient disagrees with the gradient.

    gradient: [replicas, parameters]; memory: [replicas, tasks, parameters], gradients on the old tasks.
    """
    inner = torch.bmm(memory, gradient[:, :, None])[:, :, 0]
    if not bool((inner < 0).any()):
        return gradient
    v = solve(torch.bmm(memory, memory.mT), inner, options)
    return torch.baddbmm(gradient[:, None], v[:, None], memory)[:, 0]


class _Projected(Learner):
    """theta <- theta - lr * projected(clip(grad l(theta; B))); the examples of B are remembered first."""

    state = (*Learner.state, "memory")

    def __init__(self, network, options, seeds, **where):
        super().__init__(network, options, seeds, **where)
        self.memory = TaskRings(options.n_memories)

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        o, batch = self.options, Batch.of(x, y, t)
        if self.epoch == 0:
            self.memory.add(the_task(t), batch)
        for _ in range(o.glances):
            loss, gradient = loss_and_gradient(self.network, self.weights, batch)
            gradient = self._projected(clip_by_norm_(gradient, o.grad_clip_norm), the_task(t))
            self.weights.sub_(gradient, alpha=o.lr)
        return loss

    def _projected(self, gradient: Tensor, t: int) -> Tensor:
        raise NotImplementedError

    def _task_gradients(self, earlier: Earlier) -> Tensor:
        """Clipped gradients on what is kept of each of the tasks, [replicas, tasks, parameters]."""
        gradients = group_gradients(self.network, self.weights, earlier.batch, len(earlier.tasks), earlier.shares)
        return clip_by_norm_(gradients, self.options.grad_clip_norm)


class GEM(_Projected):
    """Projects g onto the gradients that have no negative inner product with any g_k, k an earlier task:

        g~ = g + sum_k v_k g_k,   v = argmin 1/2 v' (G G' + ridge I) v + (G g)' v  subject to  v >= margin

    where some <g, g_k> < 0, else g~ = g; rows of G are the g_k, gradients on the last n_memories examples of each task.
    Lopez-Paz and Ranzato 2017, Algorithm 1.
    """

    def _projected(self, gradient: Tensor, t: int) -> Tensor:
        earlier = self.memory.before(t)
        if earlier is None:
            return gradient
        if earlier.size <= SMALL_RING and hasattr(self.network, "group_products"):
            return self._projected_without_gradients(gradient, earlier)
        return project(gradient, self._task_gradients(earlier), self.options)

    def _projected_without_gradients(self, gradient: Tensor, earlier: Earlier) -> Tensor:
        """The same from inner products only: with many tasks and small rings, the g_k cost more than all the rest."""
        kept, shares = earlier.batch, earlier.shares
        gram, inner = self.network.group_products(self.weights, kept, len(earlier.tasks), shares, gradient)
        clipped = torch.ones_like(inner)
        if limit := self.options.grad_clip_norm:
            clipped = limit / gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().clamp(min=limit)
        v = solve(gram * clipped[:, :, None] * clipped[:, None], inner * clipped, self.options)
        if v is None:
            return gradient
        weighting = shares * (v * clipped).repeat_interleave(earlier.size, dim=1)
        return gradient + loss_and_gradient(self.network, self.weights, kept, weighting=weighting)[1]


class AGEM(_Projected):
    """g~ = g - min(0, <g, r>) / <r, r> r,  with r the gradient on a random batch of what is kept of earlier tasks.

    Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", equation 11.
    """

    def _projected(self, gradient: Tensor, t: int) -> Tensor:
        earlier = self.memory.before(t, skip=0 if self.options.protect_first_task else 1)
        if earlier is None:
            return gradient
        reference = self._reference(earlier)
        product = (gradient * reference).sum(dim=1, keepdim=True).clamp(max=0)
        square = (reference * reference).sum(dim=1, keepdim=True)
        return gradient - torch.where(square > 0, product / square, 0) * reference

    def _reference(self, earlier: Earlier) -> Tensor:
        """r [replicas, parameters]."""
        if self.options.reference == "task_mean":
            return self._task_gradients(earlier).mean(dim=1)
        n = min(self.options.replay_batch_size, len(earlier.written))
        drawn = [rng.choice(earlier.written, n, replace=False, shuffle=False) for rng in self.random["replay"]]
        batch = earlier.batch.take(torch.from_numpy(np.stack(drawn)).to(earlier.batch.y.device))
        _, reference = loss_and_gradient(self.network, self.weights, batch)
        return clip_by_norm_(reference, self.options.grad_clip_norm)
