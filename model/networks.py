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
from model.gradients import sgd_steps_
from utils.errors import UserError
from utils.options import option


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    arch: Literal["linear", "pc_cnn"] = option(
        "linear", "network: linear is a multi-layer perceptron with ReLU, pc_cnn convolutions of stride 2 with ReLU"
    )
    n_hiddens: int = option(100, "linear: units of each hidden layer", low=1, high=10**6)
    n_layers: int = option(2, "linear: number of hidden layers", low=0, high=100)
    channels: int = option(160, "pc_cnn: channels of each convolution", low=1, high=10_000)
    init: Literal["kaiming_normal", "xavier_normal", "xavier_uniform"] = option(
        "kaiming_normal", "distribution of the initial weights (biases start at 0)"
    )

    def check(self, images: bool) -> None:
        """UserError if the network is not for such examples: images, or flat ones."""
        if images != (self.arch == "pc_cnn"):
            raise UserError(
                f"--arch {self.arch} takes {'flat examples' if images else 'images'}, and this --dataset has"
                f" {'images' if images else 'flat examples'}: give --arch {'pc_cnn' if images else 'linear'}."
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


class Heads:
    """Which outputs compete for an example, where every task has classes of its own.

    Args:
        classes: outputs in all. per_task: of each task, one task's after the other's.
        scenario: "task": when it is learnt, those of an example's task; "class": those of all tasks begun so far.

    `seen`, the number of tasks begun, is the only thing that changes.
    """

    #: The logit of an output that does not compete: its probability is exactly 0, and it is a finite number. Below
    #: icarl.NEVER: of a task without exemplars, its own classes are still better than others.
    OUT = -1e11

    def __init__(self, classes: int, per_task: int, scenario: str):
        self.per_task, self.scenario, self.seen = per_task, scenario, 0
        self._task_of_output = torch.arange(classes) // per_task

    def begin(self, t: int) -> None:
        """Task t is seen from now on, and all before it."""
        self.seen = max(self.seen, t + 1)

    def task_of(self, y: Tensor) -> Tensor:
        """The tasks that classes belong to."""
        return y // self.per_task

    def to_learn(self, logits: Tensor, t: Tensor) -> Tensor:
        """Logits [replicas, batch, classes] of examples of tasks t [replicas, batch], those that do not compete OUT."""
        if self.scenario == "class":
            return self.to_predict(logits, None)
        return logits.masked_fill(self._tasks(logits) != t[:, :, None], self.OUT)

    def to_predict(self, logits: Tensor, t: int | None) -> Tensor:
        """The same for examples that are all of task t, or of any task seen so far."""
        tasks = self._tasks(logits)
        return logits.masked_fill(tasks >= self.seen if t is None else tasks != t, self.OUT)

    def _tasks(self, logits: Tensor) -> Tensor:
        self._task_of_output = self._task_of_output.to(logits.device)
        return self._task_of_output

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]


class Network:
    """A function of weights [replicas, parameters] and examples, with the layout of the former.

    heads: which outputs compete; None where all tasks share all classes.
    """

    heads: Heads | None = None
    layout: Layout

    def initial_weights(self, rngs, dtype=torch.float32) -> Tensor:
        """[replicas, parameters], row r drawn with rngs[r], a NumPy generator; biases are 0."""
        weights = torch.zeros(len(rngs), self.layout.parameters, dtype=dtype)
        for tensor in self.layout.tensors(weights):
            if tensor.ndim > 2:
                for row, rng in zip(tensor, rngs, strict=True):
                    row.copy_(torch.from_numpy(draw(self.init, rng, tuple(row.shape))))
        return weights

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights: [replicas, parameters], x: [replicas, batch, ...] -> logits [replicas, batch, classes]."""
        raise NotImplementedError

    def narrowed(self, by: int) -> "Network":
        """The same network with 1/by of its hidden units or channels, at least 1."""
        raise NotImplementedError

    def to_predict(self, logits: Tensor, t: int | None) -> Tensor:
        """Logits of examples of task t, or of any task; those of outputs that do not compete become Heads.OUT."""
        return logits if self.heads is None else self.heads.to_predict(logits, t)

    def to_learn(self, logits: Tensor, t: Tensor) -> Tensor:
        """The same for examples that are learnt, of tasks t [replicas, batch]."""
        return logits if self.heads is None else self.heads.to_learn(logits, t)

    def loss(self, weights: Tensor, batch: Batch, weighting=None, targets=None) -> Tensor:
        """Cross-entropy of each replica [replicas]; see `cross_entropy`."""
        return cross_entropy(self.to_learn(self(weights, batch.x), batch.t), batch, weighting, targets)


def draw(init: str, rng, shape: tuple[int, ...]):
    """Initial weights [outputs, inputs, ...]; see NetworkOptions.init."""
    fan_in, area = math.prod(shape[1:]), math.prod(shape[2:])
    fan_out = shape[0] * area
    if init == "xavier_uniform":
        bound = math.sqrt(6 / (fan_in + fan_out))
        return rng.uniform(-bound, bound, shape)
    variance = 2 / (fan_in + fan_out) if init == "xavier_normal" else 2 / fan_in
    return rng.normal(0, math.sqrt(variance), shape)


class MLP(Network):
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

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights: [replicas, parameters], x: [replicas, batch, ...] -> logits [replicas, batch, classes]."""
        return self._activations(self.layout.tensors(weights), x)[-1]

    def narrowed(self, by: int) -> "MLP":
        return MLP(self.widths[0], [max(1, width // by) for width in self.widths[1:-1]], self.classes, self.init)

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the output layer sees, [replicas, batch, units]; arguments as of a call."""
        return self._activations(self.layout.tensors(weights), x)[-2]

    @staticmethod
    def _activations(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
        """The input and the output of every layer."""
        return _linear_layers(tensors, x.flatten(2))

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

    def hessian_product(self, weights: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        """See model.gradients.hessian_product. Pearlmutter, "Fast exact multiplication by the Hessian", 1994: the
        derivative, along `vector`, of all that loss_and_gradient computes."""
        tensors, directions = self.layout.tensors(weights), self.layout.tensors(vector)
        product = torch.empty_like(weights)
        values = self._activations(tensors, batch.x)
        _linear_hessian(tensors, directions, values, None, batch, values[-1], self.layout.tensors(product))
        return product

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
        for i, d in _linear_deltas(tensors, values, delta):
            below = values[i // 2]
            pairs.addcmul_(torch.bmm(d, d.mT), torch.bmm(below, below.mT).add_(1))
            along += (d * torch.baddbmm(directions[i + 1][:, None], below, directions[i].mT)).sum(dim=2)
        size = batch.size // groups
        products = pairs.view(len(weights), groups, size, groups, size).sum(dim=(2, 4))
        return products, along.view(len(weights), groups, size).sum(dim=2)

    def _backpropagate(self, tensors: list[Tensor], values: list[Tensor], delta: Tensor, gradients: Tensor) -> None:
        """Fills gradients [replicas * groups, parameters] from delta, the loss's derivative by the logits."""
        slots = self.layout.tensors(gradients)
        rows, n = len(gradients), delta.shape[0] * delta.shape[1] // len(gradients)
        for i, d in _linear_deltas(tensors, values, delta):
            above, below = (part.reshape(rows, n, part.shape[2]) for part in (d, values[i // 2]))
            if n == 1:
                torch.mul(above.mT, below, out=slots[i])
            else:
                torch.bmm(above.mT, below, out=slots[i])
            torch.sum(above, dim=1, out=slots[i + 1])

    def sgd_chain_(self, weights: Tensor, batch: Batch, rates: Tensor, keep: float, limit: float) -> Tensor:
        """See model.gradients.sgd_chain_. Exact; without a limit several times cheaper than the steps one by one.

        The weights W of the first layer, nearly all there are, need not be touched within the chain. After steps
        1 .. i-1 with derivatives d_j by the first layer's outputs they are W - sum_j rate_j d_j x_j', so

            z_i = W x_i + b - sum_{j<i} rate_j d_j (x_j' x_i + 1)

        needs one product of W with all examples, the Gram matrix of the examples, and at the end one product that
        sums the steps up. The later, small layers are stepped as usual.
        """
        if limit:
            return sgd_steps_(self, weights, batch, rates, keep, limit)
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

    def narrowed(self, by: int) -> "ConvNet":
        network = ConvNet(self.shape, max(1, self.channels // by), self.classes, self.init)
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
        return maps, _linear_layers(tensors[-6:], maps[-1].reshape(x.shape[1], len(x), -1).transpose(0, 1))

    def loss_and_gradient(
        self, weights: Tensor, batch: Batch, out: Tensor | None = None, weighting=None, targets=None
    ) -> tuple[Tensor, Tensor]:
        """As MLP.loss_and_gradient; saves autograd's copies of what is as large as the weights."""
        tensors = self.layout.tensors(weights)
        maps, values = self._activations(tensors, batch.x)
        loss, delta = _output_delta(self.to_learn(values[-1], batch.t), batch, weighting, targets)
        gradient = torch.empty_like(weights) if out is None else out
        slots, first = self.layout.tensors(gradient), len(tensors) - 6
        for i, above in _linear_deltas(tensors[first:], values, delta):
            torch.bmm(above.mT, values[i // 2], out=slots[first + i])
            torch.sum(above, dim=1, out=slots[first + i + 1])
        for i, by_weight, by_bias in self._convolution_gradients(tensors, maps, torch.bmm(above, tensors[first])):
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
            loss, delta = _output_delta(self.to_learn(values[-1], example.t), example)
            outer = [(i, d, values[i // 2]) for i, d in _linear_deltas(linear, values, delta)]
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
        delta, bend = _linear_hessian(tensors[first:], directions[first:], values, seen, batch, logits, slots[first:])
        bend = torch.bmm(bend, tensors[first]).baddbmm_(delta, directions[first])
        delta, bend = (
            part.transpose(0, 1).reshape(maps[-1].shape) for part in (torch.bmm(delta, tensors[first]), bend)
        )
        for i in reversed(range(0, first, 2)):
            below, above = maps[i // 2 : i // 2 + 2]
            delta, bend = (torch.ops.aten.threshold_backward(part, above, 0) for part in (delta, bend))
            if i:
                _, by_weight, _ = _convolution_backward(
                    torch.cat((bend, delta)), torch.cat((below, tangents[i // 2])), tensors[i], (False, True, False)
                )
            else:
                _, by_weight, _ = _convolution_backward(bend, below, tensors[i], (False, True, False))
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


def _linear_layers(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
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


def _linear_deltas(tensors: list[Tensor], values: list[Tensor], delta: Tensor):
    """Yields (i, the loss's derivative by the outputs of a layer) of the layers, last first; i: index in tensors.

    values: see _linear_layers. delta: the derivative by the logits.
    """
    for i in reversed(range(0, len(tensors), 2)):
        yield i, delta
        if i:
            delta = torch.bmm(delta, tensors[i]).mul_(values[i // 2] > 0)


def _linear_hessian(tensors, directions, values, tangent, batch, logits, slots):
    """The linear layers' part of a Hessian product, written to `slots`.

    Args:
        tensors, directions: weight and bias of each layer, and of the vector. values: see _linear_layers.
        tangent: the derivative of values[0] along the vector, None if it is 0. logits: values[-1], as they are learnt.

    Returns: the loss's derivative by the outputs of the first layer, and the derivative of that along the vector.
    """
    tangents = [tangent]
    for i in range(0, len(tensors), 2):
        tangent = torch.baddbmm(directions[i + 1][:, None], values[i // 2], directions[i].mT)
        if tangents[-1] is not None:
            tangent.baddbmm_(tangents[-1], tensors[i].mT)
        tangents.append(tangent if i + 2 == len(tensors) else tangent.mul_(values[i // 2 + 1] > 0))
    _, delta = _output_delta(logits, batch)
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


def build_network(options: NetworkOptions, input_shape, classes: int, heads: Heads | None = None) -> Network:
    """The network that `options` describe, for examples of `input_shape`. UserError if they do not fit."""
    options.check(len(input_shape) == 3)
    if options.arch == "linear":
        return MLP(math.prod(input_shape), [options.n_hiddens] * options.n_layers, classes, options.init)
    step = 8 if input_shape[1] < 64 else 16
    if any(side < step or side % step for side in input_shape[1:]):
        raise UserError(
            f"--arch pc_cnn halves images three times (four from 64 pixels on), and these are {input_shape[1]} x"
            f" {input_shape[2]}: choose another --dataset."
        )
    network = ConvNet(input_shape, options.channels, classes, options.init)
    network.heads = heads
    return network
