"""What every network has: the layout of its weights, initial weights, and the loss of what competes."""

import math
from typing import Literal

import torch
from torch import Tensor

from model.batch import Batch
from model.networks.heads import Heads
from model.networks.losses import cross_entropy


class Layout:
    """Names and shapes of the tensors that one row of a weight matrix holds, in order."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes.values()]

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    def tensors(self, flat: Tensor | list[Tensor]) -> list[Tensor]:
        """flat: [replicas, parameters] -> views [replicas, *shape], in that order; such a list stays as it is."""
        if isinstance(flat, list):
            return flat
        parts = torch.split_with_sizes(flat, self.sizes, dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def named(self, flat: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """The same, name -> view."""
        return dict(zip(self.shapes, self.tensors(flat), strict=True))


#: Parts of a network's weights, each the last columns of a row: the output layer; what predicts, without what modulates
#: it (model/networks/modulated.py); everything.
Scope = Literal["head", "prediction", "all"]


class Network:
    """A function of weights [replicas, parameters] and examples, with the layout of the former.

    heads: which outputs compete; None where all tasks share all classes. The last two tensors of the layout are the
    weight [classes, units] and the bias of a linear output layer.
    """

    heads: Heads | None = None
    layout: Layout
    #: Tensors of the layout, counted from the first, that modulate the others.
    gate_tensors = 0

    def initial_weights(self, rngs, dtype=torch.float32) -> Tensor:
        """[replicas, parameters], row r drawn with rngs[r], a NumPy generator; biases are 0."""
        weights = torch.zeros(len(rngs), self.layout.parameters, dtype=dtype)
        for tensor in self.layout.tensors(weights):
            if tensor.ndim > 2:
                for row, rng in zip(tensor, rngs, strict=True):
                    row.copy_(torch.from_numpy(draw(self.init, rng, tuple(row.shape))))
        return weights

    def __call__(self, weights: Tensor | list[Tensor], x: Tensor) -> Tensor:
        """weights: [replicas, parameters] or the layout's tensors of them, x: [replicas, batch, ...] -> logits
        [replicas, batch, classes]."""
        raise NotImplementedError

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the output layer sees, [replicas, batch, units]; arguments as of a call."""
        raise NotImplementedError

    @property
    def units(self) -> int:
        """Numbers that the output layer sees of an example."""
        return list(self.layout.shapes.values())[-2][1]

    def classify(self, weights: Tensor | list[Tensor], features: Tensor) -> Tensor:
        """The output layer: features [replicas, batch, units] -> logits. weights: of any scope, or its tensors."""
        if isinstance(weights, Tensor):
            weight, bias = self.scope_layout("head").tensors(weights[:, -sum(self.layout.sizes[-2:]) :])
        else:
            weight, bias = weights[-2:]
        return torch.baddbmm(bias[:, None], features, weight.mT)

    def first_tensor(self, scope: Scope) -> int:
        """Of the layout's tensors, the first that belongs to the scope."""
        return {"all": 0, "prediction": self.gate_tensors, "head": len(self.layout.sizes) - 2}[scope]

    def first_column(self, scope: Scope) -> int:
        """The column of a weight matrix at which the scope begins."""
        return sum(self.layout.sizes[: self.first_tensor(scope)])

    def scope_layout(self, scope: Scope) -> Layout:
        """Of the scope's columns alone."""
        return Layout(dict(list(self.layout.shapes.items())[self.first_tensor(scope) :]))

    def below(self, weights: Tensor, x: Tensor, scope: Scope) -> Tensor | None:
        """Of a call, the part that weights before the scope decide alone, [replicas, batch, units]; None: nothing."""
        return self.features(weights, x) if scope == "head" else None

    def above(self, weights: Tensor | list[Tensor], x: Tensor, below: Tensor | None, scope: Scope) -> Tensor:
        """The rest of it: weights of the scope, and what came from `below` -> logits."""
        return self.classify(weights, below) if scope == "head" else self(weights, x)

    def narrowed(self, by: float, classes: int | None = None) -> "Network":
        """The same network with 1/by of its hidden units or channels, at least 1, and perhaps other outputs."""
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
