"""Linear layers with ReLU between them: forward, backward and twice over, for networks that end in them."""

import torch
from torch import Tensor

from model.networks.losses import output_delta


def linear_layers(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
    """The input and the output of every layer; tensors: weight and bias of each; x: [replicas, batch, inputs]."""
    values = [x]
    for i in range(0, len(tensors), 2):
        weight, bias = tensors[i : i + 2]
        if i == 0 and len(x) > 1 and x.stride(0) == 0:  # the same examples for all replicas: one product, not many
            z = torch.addmm(bias.flatten(), x[0], weight.flatten(0, 1).T)
            z = z.view(len(z), *bias.shape).transpose(0, 1)
        else:
            z = torch.baddbmm(bias[:, None], values[-1], weight.mT)
        values.append(z if i + 2 == len(tensors) else z.relu())
    return values


def linear_deltas(tensors: list[Tensor], values: list[Tensor], delta: Tensor):
    """Yields (i, the loss's derivative by the outputs of a layer) of the layers, last first; i: index in tensors.

    values: see linear_layers. delta: the derivative by the logits.
    """
    for i in reversed(range(0, len(tensors), 2)):
        yield i, delta
        if i:
            delta = torch.bmm(delta, tensors[i]).mul_(values[i // 2] > 0)


def linear_gradients(tensors, values, delta: Tensor, slots: list[Tensor]) -> Tensor:
    """Writes the gradients of the layers, of each of the equal parts of the batch, to slots [replicas * parts, *shape].

    Other arguments as of linear_deltas. Returns the loss's derivative by the outputs of the first layer.
    """
    rows, n = len(slots[0]), delta.shape[0] * delta.shape[1] // len(slots[0])
    for i, d in linear_deltas(tensors, values, delta):
        above, below = (part.reshape(rows, n, part.shape[2]) for part in (d, values[i // 2]))
        if n == 1:
            torch.mul(above.mT, below, out=slots[i])
        else:
            torch.bmm(above.mT, below, out=slots[i])
        torch.sum(above, dim=1, out=slots[i + 1])
    return d


def linear_hessian(tensors, directions, values, tangent, batch, logits, slots):
    """The linear layers' part of a Hessian product, written to `slots`.

    Args:
        tensors, directions: weight and bias of each layer, and of the vector. values: see linear_layers.
        tangent: the derivative of values[0] along the vector, None if it is 0. logits: values[-1], as they are learnt.

    Returns: the loss's derivative by the outputs of the first layer, and the derivative of that along the vector.
    """
    tangents = [tangent]
    for i in range(0, len(tensors), 2):
        tangent = torch.baddbmm(directions[i + 1][:, None], values[i // 2], directions[i].mT)
        if tangents[-1] is not None:
            tangent.baddbmm_(tangents[-1], tensors[i].mT)
        tangents.append(tangent if i + 2 == len(tensors) else tangent.mul_(values[i // 2 + 1] > 0))
    _, delta = output_delta(logits, batch)
    p = logits.softmax(dim=2)
    bend = p * (tangents[-1] - (p * tangents[-1]).sum(dim=2, keepdim=True)) / batch.size
    for i in reversed(range(0, len(tensors), 2)):
        torch.bmm(bend.mT, values[i // 2], out=slots[i])
        if tangents[i // 2] is not None:
            slots[i].baddbmm_(delta.mT, tangents[i // 2])
        torch.sum(bend, dim=1, out=slots[i + 1])
        if i:
            on = values[i // 2] > 0
            bend = torch.bmm(bend, tensors[i]).baddbmm_(delta, directions[i]).mul_(on)
            delta = torch.bmm(delta, tensors[i]).mul_(on)
    return delta, bend
