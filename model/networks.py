"""Networks as functions of their weights, with a replica axis.

All weights of a replica are one row of a matrix [replicas, parameters]; a network holds no weights, only the layout
that turns such a matrix into named tensors. So a look-ahead step, a norm, an inner product of gradients or an
interpolation is one tensor operation whatever the architecture, and code for it is written once.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch
from utils.options import option


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    arch: Literal["linear"] = option("linear", "network: linear is a multi-layer perceptron with ReLU")
    n_hiddens: int = option(100, "units of each hidden layer", low=1, high=10**6)
    n_layers: int = option(2, "number of hidden layers", low=0, high=100)
    init: Literal["kaiming_normal", "xavier_normal", "xavier_uniform"] = option(
        "kaiming_normal", "distribution of the initial weights (biases start at 0)"
    )


class Layout:
    """Names and shapes of the tensors that one row of a weight matrix holds, in order."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes.values()]

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """flat: [replicas, parameters] -> views [replicas, *shape], in the order of `shapes`."""
        parts = torch.split_with_sizes(flat, self.sizes, dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """flat: [replicas, parameters] -> name -> view [replicas, *shape]."""
        return dict(zip(self.shapes, self.tensors(flat), strict=True))


class MLP:
    """Multi-layer perceptron: linear layers with ReLU between them, one output per class.

    Args:
        inputs: numbers per example; hidden: units of each hidden layer; classes: outputs.
        init: see NetworkOptions.init.
    """

    def __init__(self, inputs: int, hidden: list[int], classes: int, init: str = "kaiming_normal"):
        self.init = init
        self.widths = [inputs, *hidden, classes]
        shapes = {}
        for i, (fan_in, fan_out) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            shapes[f"layer{i + 1}.weight"] = (fan_out, fan_in)
            shapes[f"layer{i + 1}.bias"] = (fan_out,)
        self.layout = Layout(shapes)

    def initial_weights(self, rngs, dtype=torch.float32) -> Tensor:
        """[replicas, parameters], row r drawn with rngs[r], a NumPy generator."""
        weights = torch.zeros(len(rngs), self.layout.parameters, dtype=dtype)
        for tensor in self.layout.tensors(weights):
            if tensor.ndim == 3:
                for row, rng in zip(tensor, rngs, strict=True):
                    row.copy_(torch.from_numpy(self._draw(rng, *row.shape)))
        return weights

    def _draw(self, rng, fan_out: int, fan_in: int):
        if self.init == "xavier_uniform":
            bound = math.sqrt(6 / (fan_in + fan_out))
            return rng.uniform(-bound, bound, (fan_out, fan_in))
        variance = 2 / (fan_in + fan_out) if self.init == "xavier_normal" else 2 / fan_in
        return rng.normal(0, math.sqrt(variance), (fan_out, fan_in))

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights: [replicas, parameters], x: [replicas, batch, ...] -> logits [replicas, batch, classes]."""
        return self._activations(self.layout.tensors(weights), x)[-1]

    @staticmethod
    def _activations(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
        """The input and the output of every layer."""
        values = [x.flatten(2)]
        for i in range(0, len(tensors), 2):
            weight, bias = tensors[i : i + 2]
            z = torch.baddbmm(bias[:, None], values[-1], weight.mT)
            values.append(z if i + 2 == len(tensors) else z.relu())
        return values

    def loss_and_gradient(self, weights: Tensor, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of each replica [replicas] and its gradient [replicas, parameters], without autograd.

        Back-propagation written out: 2 to 3 times cheaper than autograd at these sizes, which is what the
        single-example steps of the look-ahead cost. tests/test_gradients.py holds it to autograd.
        """
        tensors = self.layout.tensors(weights)
        values = self._activations(tensors, batch.x)
        log_p = values[-1].log_softmax(dim=2)
        target = batch.y[:, :, None]
        loss = -log_p.gather(2, target).mean(dim=(1, 2))

        delta = log_p.exp()
        delta.scatter_add_(2, target, delta.new_full((1, 1, 1), -1.0).expand_as(target))
        delta /= batch.size
        gradient = torch.empty_like(weights) if out is None else out
        slots = self.layout.tensors(gradient)
        for i in reversed(range(0, len(tensors), 2)):
            below = values[i // 2]
            if batch.size == 1:
                torch.mul(delta.mT, below, out=slots[i])
            else:
                torch.bmm(delta.mT, below, out=slots[i])
            torch.sum(delta, dim=1, out=slots[i + 1])
            if i:
                delta = torch.bmm(delta, tensors[i]).mul_(below > 0)
        return loss, gradient


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of each replica. logits: [replicas, batch, classes] -> [replicas]."""
    losses = F.cross_entropy(logits.flatten(0, 1), batch.y.flatten(), reduction="none")
    return losses.view_as(batch.y).mean(dim=1)


def build_network(options: NetworkOptions, input_shape, classes: int) -> MLP:
    """The network that `options` describe, for examples of `input_shape`."""
    return MLP(math.prod(input_shape), [options.n_hiddens] * options.n_layers, classes, options.init)
