"""What the second derivations of the updates share: one replica at a time, plain autograd, float64."""

import numpy as np
import torch
from torch.nn import functional as F

from model.networks import MLP

SEEDS = (0, 1)
NETWORK = MLP(4, [5], 3)


def batches(n=3, size=4):
    for i in range(n):
        rng = np.random.default_rng(i)
        x = torch.from_numpy(rng.normal(0, 2, (len(SEEDS), size, 4)))
        yield x, torch.from_numpy(rng.integers(0, 3, (len(SEEDS), size)))


def tensors(flat, replica):
    """The layers' tensors of one replica, as separate float64 tensors."""
    return [tensor[replica].clone() for tensor in NETWORK.layout.tensors(flat)]


def loss_of(weights, x, y):
    w1, b1, w2, b2 = weights
    return F.cross_entropy(F.linear(F.relu(F.linear(x, w1, b1)), w2, b2), y)


def clipped(gradients, limit):
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    return [g * min(1.0, limit / float(norm)) if limit else g for g in gradients]


def taken(events, kind):
    found = [batch for name, batch in events if name == kind]
    events.clear()
    return found


def together(drawn, replica, x, y):
    """The replayed examples, if any, and the incoming ones."""
    if drawn is None:
        return x, y
    return torch.cat([drawn.x[replica], x]), torch.cat([drawn.y[replica], y])


def gradient_of(weights, x, y):
    """Gradients, one per tensor, of the mean loss on x and y."""
    weights = [w.detach().requires_grad_() for w in weights]
    return torch.autograd.grad(loss_of(weights, x, y), weights)


def stepped(weights, gradients, rate):
    return [w - rate * g for w, g in zip(weights, gradients, strict=True)]


def flat(parts):
    return torch.cat([part.flatten() for part in parts])
