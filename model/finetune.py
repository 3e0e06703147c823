"""Gradients of a part of a network, the rest being constant: of the scopes of model/networks/base.py."""

import torch
from torch import Tensor

from model.batch import Batch
from model.networks.losses import cross_entropy, output_delta


def head_loss_and_gradient(network, weights: Tensor, batch: Batch, features: Tensor, scope="head"):
    """loss_and_gradient of the output layer alone, of examples whose features are known.

    Args:
        weights: [replicas, n], columns of the scope "head". features: [replicas, batch, units].
    """
    tensors = network.scope_layout("head").tensors(weights)
    logits = network.to_learn(network.classify(tensors, features), batch.t)
    loss, delta = output_delta(logits, batch)
    gradient = torch.empty_like(weights, memory_format=torch.contiguous_format)
    by_weight, by_bias = network.scope_layout("head").tensors(gradient)
    torch.bmm(delta.mT, features, out=by_weight)
    torch.sum(delta, dim=1, out=by_bias)
    return loss, gradient


def scope_loss_and_gradient(network, weights: Tensor, batch: Batch, below: Tensor | None, scope):
    """loss_and_gradient of the columns of a scope; below: see Network.below."""
    weights = weights.detach().requires_grad_()
    with torch.enable_grad():
        logits = network.above(network.scope_layout(scope).tensors(weights), batch.x, below, scope)
        loss = cross_entropy(network.to_learn(logits, batch.t), batch)
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
    return loss.detach(), gradient
