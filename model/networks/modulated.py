"""A network whose features another network, the neuromodulatory one, turns up and down."""

import torch
from torch import Tensor

from model.networks.base import Layout, Network, Scope


class Modulated(Network):
    """logits = head(h(x) * sigmoid(g(x))), h being the features of one network and g the outputs of another.

    ANML's network (Beaulieu et al. 2020, "Learning to Continually Learn"): g sees the image itself and decides, number
    by number, how much of h passes forward and how much of the gradient passes back.

    Args:
        prediction: the network that h and the head belong to. gate: g, with as many outputs as h has numbers.
        bias: initial bias of the last layer of g; 0 as in the paper: gates start half open.

    A row of weights holds those of g, named "gate.…", and after them those of the prediction network.
    """

    def __init__(self, prediction: Network, gate: Network, bias: float = 0.0):
        self.prediction, self.gate, self.bias = prediction, gate, bias
        self.classes, self.heads = prediction.classes, prediction.heads
        self.gate_tensors = len(gate.layout.shapes)
        gates = {f"gate.{name}": shape for name, shape in gate.layout.shapes.items()}
        self.layout = Layout(gates | prediction.layout.shapes)

    def initial_weights(self, rngs, dtype=torch.float32) -> Tensor:
        """The prediction network is drawn first: it starts as it would without gates."""
        prediction, gate = (part.initial_weights(rngs, dtype) for part in (self.prediction, self.gate))
        self.gate.layout.tensors(gate)[-1].fill_(self.bias)
        return torch.cat([gate, prediction], dim=1)

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights: [replicas, parameters], x: [replicas, batch, ...] -> logits [replicas, batch, classes]."""
        tensors = self.layout.tensors(weights)
        return self.above(tensors[self.gate_tensors :], x, self.gates(tensors, x), "prediction")

    def gates(self, weights: Tensor, x: Tensor) -> Tensor:
        """How much of each feature passes, [replicas, batch, units] in 0 .. 1; arguments as of a call."""
        return self.gate(self.layout.tensors(weights)[: self.gate_tensors], x).sigmoid()

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        tensors = self.layout.tensors(weights)
        return self.prediction.features(tensors[self.gate_tensors :], x) * self.gates(tensors, x)

    def below(self, weights: Tensor, x: Tensor, scope: Scope) -> Tensor | None:
        return self.gates(weights, x) if scope == "prediction" else super().below(weights, x, scope)

    def above(self, weights: Tensor, x: Tensor, below: Tensor | None, scope: Scope) -> Tensor:
        if scope != "prediction":
            return super().above(weights, x, below, scope)
        return self.classify(weights, self.prediction.features(weights, x) * below)

    def narrowed(self, by: float, classes: int | None = None) -> "Modulated":
        prediction = self.prediction.narrowed(by, classes)
        return Modulated(prediction, self.gate.narrowed(by, prediction.units), self.bias)


def modulated(prediction: Network, width: float, bias: float = 0.0) -> Modulated:
    """`prediction` with a gate of the same kind, `width` of its hidden units or channels (112 / 256 in the paper)."""
    gate = prediction.narrowed(1 / width, prediction.units)
    gate.heads = None
    return Modulated(prediction, gate, bias)
