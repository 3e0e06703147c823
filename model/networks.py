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
        tensors = self.layout.tensors(weights)
        return torch.baddbmm(tensors[-1][:, None], self._features(tensors, x), tensors[-2].mT)

    def narrowed(self, by: int) -> "ConvNet":
        network = ConvNet(self.shape, max(1, self.channels // by), self.classes, self.init)
        network.heads = self.heads
        return network

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the output layer sees, [replicas, batch, units]; arguments as of a call."""
        return self._features(self.layout.tensors(weights), x)

    def _features(self, tensors: list[Tensor], x: Tensor) -> Tensor:
        replicas, batch = x.shape[:2]
        h = x.transpose(0, 1).flatten(1, 2)  # replicas side by side as groups of channels
        for weight, bias in zip(tensors[:-6:2], tensors[1:-6:2], strict=True):
            h = F.conv2d(h, weight.flatten(0, 1), bias.flatten(), stride=2, padding=1, groups=replicas).relu()
        h = h.reshape(batch, replicas, -1).transpose(0, 1)
        for weight, bias in zip(tensors[-6:-2:2], tensors[-5:-2:2], strict=True):
            h = torch.baddbmm(bias[:, None], h, weight.mT).relu()
        return h


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
