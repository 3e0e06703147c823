"""How gradients are taken: the one place that decides, and what is done to them afterwards."""

import torch
from torch import Tensor

from model.batch import Batch


def loss_and_gradient(
    network, weights: Tensor, batch: Batch, out: Tensor | None = None, weighting=None, targets=None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy per replica [replicas] and its gradient [replicas, parameters], both constants.

    Uses the network's own written-out gradient where it has one, and autograd otherwise.

    Args:
        out: where the gradient is written: a fresh matrix at every inner step costs more than the arithmetic on it.
        weighting: the loss is the sum over examples of weighting * cross-entropy; [replicas, batch], [batch] or a
            number. None is the mean.
        targets: probabilities [replicas, batch, classes] to learn instead of batch.y.
    """
    if hasattr(network, "loss_and_gradient"):
        with torch.no_grad():
            return network.loss_and_gradient(weights, batch, out, weighting, targets)
    weights = weights.detach().requires_grad_()
    loss = network.loss(weights, batch, weighting, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), weights)
    return loss.detach(), gradient if out is None else out.copy_(gradient)


def group_gradients(network, weights: Tensor, batch: Batch, groups: int, weighting=None) -> Tensor:
    """Gradients of the loss of each of `groups` equal parts of the batch, [replicas, groups, parameters].

    The loss is the mean, or with weighting ([batch] or [replicas, batch]) the weighted sum. One part per example gives
    the gradient of every example.
    """
    if hasattr(network, "group_gradients"):
        with torch.no_grad():
            return network.group_gradients(weights, batch, groups, weighting)
    shares = (
        [None] * groups if weighting is None else weighting.expand(batch.y.shape).split(batch.size // groups, dim=1)
    )
    parts = zip(batch.split(groups), shares, strict=True)
    return torch.stack([loss_and_gradient(network, weights, part, weighting=w)[1] for part, w in parts], dim=1)


def sgd_chain_(network, weights: Tensor, batch: Batch, rates: Tensor, keep: float = 1.0, limit: float = 0.0) -> Tensor:
    """One step of SGD on each example of the batch in turn, in place; of the whole way, the fraction `keep` is gone.

        theta_0 = weights;  theta_i = theta_{i-1} - rates_i * clip(grad l(theta_{i-1}; example i))
        weights <- theta_0 + keep * (theta_n - theta_0)

    Args:
        rates: broadcasts to [replicas, batch].
        limit: largest L2 norm of each gradient; 0 for none.

    Returns: the loss of each example at the time of its step, [replicas, batch].
    """
    if hasattr(network, "sgd_chain_"):
        with torch.no_grad():
            return network.sgd_chain_(weights, batch, rates, keep, limit)
    return sgd_steps_(network, weights, batch, rates, keep, limit)


def sgd_steps_(network, weights: Tensor, batch: Batch, rates: Tensor, keep: float, limit: float) -> Tensor:
    """sgd_chain_ for any network, gradient by gradient."""
    theta, gradient, losses = weights.clone(), torch.empty_like(weights), []
    for example, rate in zip(batch.split(batch.size), rates.expand_as(batch.y).T, strict=True):
        loss, _ = loss_and_gradient(network, theta, example, out=gradient)
        theta.addcmul_(clip_by_norm_(gradient, limit), rate[:, None], value=-1)
        losses.append(loss)
    weights.lerp_(theta, keep)
    return torch.stack(losses, dim=1)


def hessian_product(network, weights: Tensor, batch: Batch, vector: Tensor) -> Tensor:
    """The Hessian of each replica's mean cross-entropy times `vector`: [replicas, parameters] both.

    Uses the network's own product where it has one, and autograd otherwise.
    """
    if hasattr(network, "hessian_product"):
        with torch.no_grad():
            return network.hessian_product(weights, batch, vector)
    weights = weights.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(network.loss(weights, batch).sum(), weights, create_graph=True)
    return torch.autograd.grad(gradient, weights, vector)[0]


def clip_by_norm_(gradient: Tensor, limit: float) -> Tensor:
    """Scales each gradient down, in place, to an L2 norm of at most `limit`; 0 leaves it as it is.

    gradient: [replicas, ..., parameters]; the norm is over all weights of a replica, which never sees another's.
    """
    if limit:
        gradient *= limit / gradient.norm(dim=-1, keepdim=True).clamp(min=limit)
    return gradient
