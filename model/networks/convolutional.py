"""The convolutional networks for images, with their gradients written out."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch
from model.networks.base import Layout, Network
from model.networks.linear import linear_deltas, linear_gradients, linear_hessian, linear_layers
from model.networks.losses import output_delta


class ConvNet(Network):
    """Convolutions of 3 x 3, stride 2 and padding 1, then three linear layers, ReLU between all of them.

    The networks of Gupta et al. 2020: 160 channels; three convolutions and 320 units for 32 x 32 pixels (1,419,940
    parameters with 100 classes), four and 640 for 64 x 64 (2,873,640 with 200).

    Args:
        shape: channels, height and width of the images; both a multiple of 8 or, from 64 pixels on, of 16.
        channels: of each convolution. classes: outputs. init: see NetworkOptions.init.
    """

    def __init__(self, shape: tuple[int, int, int], channels: int, classes: int, init: str = "kaiming_normal"):
        self.init, self.classes, self.shape, self.channels = init, classes, shape, channels
        depth = 3 if shape[1] < 64 else 4
        units, side = 2 ** (depth - 2) * channels, (shape[1] >> depth, shape[2] >> depth)
        sizes = {f"conv{i + 1}": (channels, channels if i else shape[0], 3, 3) for i in range(depth)}
        sizes |= {"layer1": (units, channels * math.prod(side)), "layer2": (units, units), "layer3": (classes, units)}
        self.layout = Layout(
            {
                f"{name}.{kind}": size if kind == "weight" else size[:1]
                for name, size in sizes.items()
                for kind in ("weight", "bias")
            }
        )

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights: [replicas, parameters], x: [replicas, batch, *shape] -> logits [replicas, batch, classes]."""
        return self._activations(self.layout.tensors(weights), x)[1][-1]

    def narrowed(self, by: float, classes: int | None = None) -> "ConvNet":
        network = ConvNet(self.shape, max(1, int(self.channels / by + 1e-9)), classes or self.classes, self.init)
        network.heads = self.heads
        return network

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the output layer sees, [replicas, batch, units]; arguments as of a call."""
        return self._activations(self.layout.tensors(weights), x)[1][-2]

    def _activations(self, tensors: list[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The input and the output of every convolution, [batch, replicas * channels, height, width], and of every
        linear layer."""
        maps = [x.transpose(0, 1).flatten(1, 2)]  # replicas side by side as groups of channels
        for weight, bias in zip(tensors[:-6:2], tensors[1:-6:2], strict=True):
            maps.append(_convolution(maps[-1], weight, bias).relu())
        return maps, linear_layers(tensors[-6:], maps[-1].reshape(x.shape[1], len(x), -1).transpose(0, 1))

    def loss_and_gradient(
        self, weights: Tensor, batch: Batch, out: Tensor | None = None, weighting=None, targets=None
    ) -> tuple[Tensor, Tensor]:
        """As MLP.loss_and_gradient; saves autograd's copies of what is as large as the weights."""
        tensors = self.layout.tensors(weights)
        maps, values = self._activations(tensors, batch.x)
        loss, delta = output_delta(self.to_learn(values[-1], batch.t), batch, weighting, targets)
        gradient = torch.empty_like(weights) if out is None else out
        slots, first = self.layout.tensors(gradient), len(tensors) - 6
        delta = linear_gradients(tensors[first:], values, delta, slots[first:])
        for i, by_weight, by_bias in self._convolution_gradients(tensors, maps, torch.bmm(delta, tensors[first])):
            slots[i].copy_(by_weight)
            slots[i + 1].copy_(by_bias)
        return loss, gradient

    def sgd_chain_(self, weights: Tensor, batch: Batch, rates: Tensor, keep: float, limit: float) -> Tensor:
        """See model.gradients.sgd_chain_.

        A linear layer's gradient on one example is an outer product: it is never formed, only its norm is, from those
        of its factors, and it is subtracted in place.
        """
        theta = weights.clone()
        tensors, outputs = self.layout.tensors(theta), []
        linear = tensors[-6:]
        for example, rate in zip(batch.split(batch.size), rates.expand_as(batch.y).T, strict=True):
            maps, values = self._activations(tensors, example.x)
            loss, delta = output_delta(self.to_learn(values[-1], example.t), example)
            outer = [(i, d, values[i // 2]) for i, d in linear_deltas(linear, values, delta)]
            below = torch.bmm(outer[-1][1], linear[0])
            found = list(self._convolution_gradients(tensors, maps, below))
            step = rate
            if limit:
                square = sum(part.square().flatten(1).sum(dim=1) for _, *pair in found for part in pair)
                square += sum((d.square().sum(dim=2) * (h.square().sum(dim=2) + 1))[:, 0] for _, d, h in outer)
                step = rate * (limit / square.sqrt().clamp(min=limit))
            for i, d, h in outer:
                d_step = d * step[:, None, None]
                linear[i].baddbmm_(d_step.mT, h, alpha=-1)
                linear[i + 1].sub_(d_step[:, 0])
            for i, *pair in found:
                for tensor, part in zip(tensors[i : i + 2], pair, strict=True):
                    tensor.addcmul_(part, step.view(-1, *[1] * (part.ndim - 1)), value=-1)
            outputs.append(loss)
        weights.lerp_(theta, keep)
        return torch.stack(outputs, dim=1)

    def hessian_product(self, weights: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        """As MLP.hessian_product."""
        tensors, directions = self.layout.tensors(weights), self.layout.tensors(vector)
        product = torch.empty_like(weights)
        slots, first = self.layout.tensors(product), len(tensors) - 6
        maps, values = self._activations(tensors, batch.x)
        tangents: list[Tensor | None] = [None]  # of the maps; the images do not change with the weights
        for i in range(0, first, 2):
            tangent = _convolution(maps[i // 2], *directions[i : i + 2])
            if i:
                tangent += _convolution(tangents[-1], tensors[i])
            tangents.append(torch.ops.aten.threshold_backward(tangent, maps[i // 2 + 1], 0))
        seen = tangents[-1].reshape(batch.size, len(weights), -1).transpose(0, 1)
        logits = self.to_learn(values[-1], batch.t)
        delta, bend = linear_hessian(tensors[first:], directions[first:], values, seen, batch, logits, slots[first:])
        bend = torch.bmm(bend, tensors[first]).baddbmm_(delta, directions[first])
        delta, bend = (
            part.transpose(0, 1).reshape(maps[-1].shape) for part in (torch.bmm(delta, tensors[first]), bend)
        )
        for i in reversed(range(0, first, 2)):
            below, above = maps[i // 2 : i // 2 + 2]
            delta, bend = (torch.ops.aten.threshold_backward(part, above, 0) for part in (delta, bend))
            two, seen = (bend, below) if i == 0 else (torch.cat((bend, delta)), torch.cat((below, tangents[i // 2])))
            by_weight = _convolution_backward(two, seen, tensors[i], (False, True, False))[1]
            slots[i].copy_(by_weight.view_as(slots[i]))
            torch.sum(bend.view(batch.size, len(weights), -1, bend[0, 0].numel()), dim=(0, 3), out=slots[i + 1])
            if i:
                bend = _convolution_backward(bend, below, tensors[i], (True, False, False))[0]
                bend += _convolution_backward(delta, below, directions[i], (True, False, False))[0]
                delta = _convolution_backward(delta, below, tensors[i], (True, False, False))[0]
        return product

    def _convolution_gradients(self, tensors: list[Tensor], maps: list[Tensor], delta: Tensor):
        """Yields (i, the loss's derivatives by weight and bias) of the convolutions, last first; i: index in tensors.

        delta: the derivative by what the linear layers see, [replicas, batch, numbers].
        """
        delta = delta.transpose(0, 1).reshape(maps[-1].shape)
        for i in reversed(range(len(maps) - 1)):
            delta = torch.ops.aten.threshold_backward(delta, maps[i + 1], 0)
            weight, bias = tensors[2 * i : 2 * i + 2]
            delta, by_weight, by_bias = _convolution_backward(delta, maps[i], weight, (i > 0, True, True))
            yield 2 * i, by_weight.view_as(weight), by_bias.view_as(bias)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [batch, replicas * inputs, height, width]; weight: [replicas, outputs, inputs, 3, 3]; halves the sides."""
    bias = None if bias is None else bias.flatten()
    return F.conv2d(x, weight.flatten(0, 1), bias, stride=2, padding=1, groups=len(weight))


def _convolution_backward(delta: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]):
    """From delta, the derivative by the outputs of _convolution, those by (x, weight, bias) as far as wanted."""
    biases = [weight.shape[0] * weight.shape[1]]
    return torch.ops.aten.convolution_backward(
        delta, x, weight.flatten(0, 1), biases, [2, 2], [1, 1], [1, 1], False, [0, 0], len(weight), wanted
    )
