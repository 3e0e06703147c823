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
        self.init, self.classes = init, classes
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

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the output layer sees, [replicas, batch, units]; arguments as of a call."""
        return self._activations(self.layout.tensors(weights), x)[-2]

    @staticmethod
    def _activations(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
        """The input and the output of every layer."""
        values = [x.flatten(2)]
        for i in range(0, len(tensors), 2):
            weight, bias = tensors[i : i + 2]
            if i == 0 and len(x) > 1 and x.stride(0) == 0:  # the same examples for all replicas: one product, not many
                z = torch.addmm(bias.flatten(), values[0][0], weight.flatten(0, 1).T)
                z = z.view(len(z), *bias.shape).transpose(0, 1)
            else:
                z = torch.baddbmm(bias[:, None], values[-1], weight.mT)
            values.append(z if i + 2 == len(tensors) else z.relu())
        return values

    def loss_and_gradient(
        self, weights: Tensor, batch: Batch, out: Tensor | None = None, weighting=None, targets=None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each replica [replicas] and its gradient [replicas, parameters], without autograd.

        Back-propagation written out: 2 to 3 times cheaper than autograd at these sizes, which is what the
        single-example steps of the look-ahead cost. tests/test_gradients.py holds it to autograd. weighting, targets:
        see model.gradients.loss_and_gradient.
        """
        tensors = self.layout.tensors(weights)
        values = self._activations(tensors, batch.x)
        loss, delta = _output_delta(values[-1], batch, weighting, targets)
        gradient = torch.empty_like(weights) if out is None else out
        self._backpropagate(tensors, values, delta, gradient)
        return loss, gradient

    def group_gradients(self, weights: Tensor, batch: Batch, groups: int, weighting=None) -> Tensor:
        """See model.gradients.group_gradients."""
        tensors = self.layout.tensors(weights)
        values = self._activations(tensors, batch.x)
        _, delta = _output_delta(values[-1], batch, groups / batch.size if weighting is None else weighting)
        gradients = weights.new_empty(len(weights) * groups, weights.shape[1])
        self._backpropagate(tensors, values, delta, gradients)
        return gradients.view(len(weights), groups, -1)

    def group_products(self, weights: Tensor, batch: Batch, groups: int, weighting: Tensor, vector: Tensor):
        """Inner products of the gradients of `groups` equal parts of the batch, without the gradients themselves.

        A layer's gradient on one example is the outer product of d, the loss's derivative by its outputs, and (h, 1),
        its inputs; so the inner product of the gradients on two examples is the sum over layers of d'd (h'h + 1).
        Cheaper than group_gradients where parts are small and many.

        Args:
            weighting: of each example in the loss of its part, [batch]. vector: [replicas, parameters].

        Returns: the products of the parts' gradients with each other [replicas, groups, groups], and with `vector`
            [replicas, groups].
        """
        tensors, directions = self.layout.tensors(weights), self.layout.tensors(vector)
        values = self._activations(tensors, batch.x)
        _, delta = _output_delta(values[-1], batch, weighting)
        pairs = torch.zeros(len(weights), batch.size, batch.size, dtype=weights.dtype, device=weights.device)
        along = pairs.new_zeros(len(weights), batch.size)
        for i in reversed(range(0, len(tensors), 2)):
            below = values[i // 2]
            pairs.addcmul_(torch.bmm(delta, delta.mT), torch.bmm(below, below.mT).add_(1))
            along += (delta * torch.baddbmm(directions[i + 1][:, None], below, directions[i].mT)).sum(dim=2)
            if i:
                delta = torch.bmm(delta, tensors[i]).mul_(below > 0)
        size = batch.size // groups
        products = pairs.view(len(weights), groups, size, groups, size).sum(dim=(2, 4))
        return products, along.view(len(weights), groups, size).sum(dim=2)

    def _backpropagate(self, tensors: list[Tensor], values: list[Tensor], delta: Tensor, gradients: Tensor) -> None:
        """Fills gradients [replicas * groups, parameters] from delta, the loss's derivative by the logits."""
        slots = self.layout.tensors(gradients)
        rows, n = len(gradients), delta.shape[0] * delta.shape[1] // len(gradients)
        for i in reversed(range(0, len(tensors), 2)):
            below = values[i // 2]
            above_rows, below_rows = (part.reshape(rows, n, part.shape[2]) for part in (delta, below))
            if n == 1:
                torch.mul(above_rows.mT, below_rows, out=slots[i])
            else:
                torch.bmm(above_rows.mT, below_rows, out=slots[i])
            torch.sum(above_rows, dim=1, out=slots[i + 1])
            if i:
                delta = torch.bmm(delta, tensors[i]).mul_(below > 0)

    def sgd_chain_(self, weights: Tensor, batch: Batch, rates: Tensor, keep: float) -> Tensor:
        """See model.gradients.sgd_chain_. Exact, and several times cheaper than taking the steps one by one.

        The weights W of the first layer, nearly all there are, need not be touched within the chain. After steps
        1 .. i-1 with derivatives d_j by the first layer's outputs they are W - sum_j rate_j d_j x_j', so

            z_i = W x_i + b - sum_{j<i} rate_j d_j (x_j' x_i + 1)

        needs one product of W with all examples, the Gram matrix of the examples, and at the end one product that
        sums the steps up. The later, small layers are stepped as usual.
        """
        x, n = batch.x.flatten(2), batch.size
        (weight, bias), later = (parts := self.layout.tensors(weights))[:2], [part.clone() for part in parts[2:]]
        starts = torch.baddbmm(bias[:, None], x, weight.mT).split(1, dim=1)
        gram = torch.bmm(x, x.mT).add_(1).split(1, dim=1)
        rates = rates.expand(len(weights), n)[:, :, None]
        right = x.new_zeros(len(weights), n, self.widths[-1])
        right = right.scatter_(2, batch.y[:, :, None], -rates).split(1, dim=1)
        steps, rates = x.new_zeros(len(weights), n, self.widths[1]), rates.split(1, dim=1)
        slots, outputs = steps.split(1, dim=1), []
        layers = [(w, w.mT, b[:, None]) for w, b in zip(later[::2], later[1::2], strict=True)]
        for i in range(n):
            z = torch.baddbmm(starts[i], gram[i].narrow(2, 0, i), steps.narrow(1, 0, i), alpha=-1)
            inputs = []
            for _, transposed, offset in layers:
                inputs.append(z.relu_())
                z = torch.baddbmm(offset, z, transposed)
            outputs.append(z)
            delta = torch.addcmul(right[i], z.softmax(dim=2), rates[i])
            for (matrix, _, offset), below in zip(reversed(layers), reversed(inputs), strict=True):
                passed = torch.ops.aten.threshold_backward(torch.bmm(delta, matrix), below, 0)
                matrix.addcmul_(delta.mT, below, value=-1)
                offset.sub_(delta)
                delta = passed
            slots[i].copy_(delta)
        weight.baddbmm_(steps.mT, x, alpha=-keep)
        bias.sub_(steps.sum(dim=1), alpha=keep)
        for part, stepped in zip(parts[2:], later, strict=True):
            part.lerp_(stepped, keep)
        return -torch.cat(outputs, dim=1).log_softmax(dim=2).gather(2, batch.y[:, :, None])[:, :, 0]


def _output_delta(logits: Tensor, batch: Batch, weighting=None, targets=None) -> tuple[Tensor, Tensor]:
    """The loss [replicas] and its derivative by the logits [replicas, batch, classes]."""
    log_p = logits.log_softmax(dim=2)
    delta = log_p.exp()
    if targets is None:
        right = batch.y[:, :, None]
        losses = -log_p.gather(2, right)[:, :, 0]
        delta.scatter_add_(2, right, delta.new_full((1, 1, 1), -1.0).expand_as(right))
    else:
        losses = -(targets * log_p).sum(dim=2)
        delta -= targets
    if weighting is None:
        weighting = 1 / batch.size
    if isinstance(weighting, Tensor):
        return (losses * weighting).sum(dim=1), delta.mul_(weighting[..., None])
    return losses.sum(dim=1) * weighting, delta.mul_(weighting)


def cross_entropy(logits: Tensor, batch: Batch, weighting=None, targets=None) -> Tensor:
    """Cross-entropy of each replica. logits: [replicas, batch, classes] -> [replicas].

    weighting, targets: see model.gradients.loss_and_gradient.
    """
    labels = batch.y.flatten() if targets is None else targets.flatten(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view_as(batch.y)
    return losses.mean(dim=1) if weighting is None else (losses * weighting).sum(dim=1)


def build_network(options: NetworkOptions, input_shape, classes: int) -> MLP:
    """The network that `options` describe, for examples of `input_shape`."""
    return MLP(math.prod(input_shape), [options.n_hiddens] * options.n_layers, classes, options.init)
