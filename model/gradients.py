"""How gradients are taken: the one place that decides, and what is done to them afterwards."""

import torch
from torch import Tensor

from model.batch import Batch
from model.networks import cross_entropy


def loss_and_gradient(network, weights: Tensor, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy per replica [replicas] and its gradient [replicas, parameters], both constants.

    Uses the network's own written-out gradient where it has one, and autograd otherwise. The gradient is written into
    `out` if that is given: a fresh matrix at every inner step costs more than the arithmetic on it.
    """
    if hasattr(network, "loss_and_gradient"):
        with torch.no_grad():
            return network.loss_and_gradient(weights, batch, out)
    weights = weights.detach().requires_grad_()
    loss = cross_entropy(network(weights, batch.x), batch)
    (gradient,) = torch.autograd.grad(loss.sum(), weights)
    return loss.detach(), gradient if out is None else out.copy_(gradient)


def differentiable_gradient(network, weights: Tensor, batch: Batch) -> Tensor:
    """The same gradient, itself differentiable with respect to `weights` (for second-order look-ahead)."""
    loss = cross_entropy(network(weights, batch.x), batch)
    return torch.autograd.grad(loss.sum(), weights, create_graph=True)[0]


def clip_by_norm_(gradient: Tensor, limit: float) -> Tensor:
    """Scales each replica's gradient down, in place, to an L2 norm of at most `limit`; 0 leaves it as it is.

    gradient: [replicas, parameters]; the norm is over all weights of a replica, which never sees another's.
    """
    if limit:
        gradient *= limit / gradient.norm(dim=1, keepdim=True).clamp(min=limit)
    return gradient
