"""The multi-layer perceptron, with its gradients written out."""

import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import sgd_steps_
from model.networks.base import Layout, Network
from model.networks.linear import linear_deltas, linear_gradients, linear_hessian, linear_layers
from model.networks.losses import output_delta


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

    def narrowed(self, by: float, classes: int | None = None) -> "MLP":
        hidden = [max(1, int(width / by + 1e-9)) for width in self.widths[1:-1]]
        network = MLP(self.widths[0], hidden, classes or self.classes, self.init)
        network.heads = self.heads
        return network

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the output layer sees, [replicas, batch, units]; arguments as of a call."""
        return self._activations(self.layout.tensors(weights), x)[-2]

    @staticmethod
    def _activations(tensors: list[Tensor], x: Tensor) -> list[Tensor]:
        """The input and the output of every layer."""
        return linear_layers(tensors, x.flatten(2))

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
        loss, delta = output_delta(values[-1], batch, weighting, targets)
        gradient = torch.empty_like(weights) if out is None else out
        linear_gradients(tensors, values, delta, self.layout.tensors(gradient))
        return loss, gradient

    def hessian_product(self, weights: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        """See model.gradients.hessian_product. Pearlmutter, "Fast exact multiplication by the Hessian", 1994: the
        derivative, along `vector`, of all that loss_and_gradient computes."""
        tensors, directions = self.layout.tensors(weights), self.layout.tensors(vector)
        product = torch.empty_like(weights)
        values = self._activations(tensors, batch.x)
        linear_hessian(tensors, directions, values, None, batch, values[-1], self.layout.tensors(product))
        return product

    def group_gradients(self, weights: Tensor, batch: Batch, groups: int, weighting=None) -> Tensor:
        """See model.gradients.group_gradients."""
        tensors = self.layout.tensors(weights)
        values = self._activations(tensors, batch.x)
        _, delta = output_delta(values[-1], batch, groups / batch.size if weighting is None else weighting)
        gradients = weights.new_empty(len(weights) * groups, weights.shape[1])
        linear_gradients(tensors, values, delta, self.layout.tensors(gradients))
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
        _, delta = output_delta(values[-1], batch, weighting)
        pairs = torch.zeros(len(weights), batch.size, batch.size, dtype=weights.dtype, device=weights.device)
        along = pairs.new_zeros(len(weights), batch.size)
        for i, d in linear_deltas(tensors, values, delta):
            below = values[i // 2]
            pairs.addcmul_(torch.bmm(d, d.mT), torch.bmm(below, below.mT).add_(1))
            along += (d * torch.baddbmm(directions[i + 1][:, None], below, directions[i].mT)).sum(dim=2)
        size = batch.size // groups
        products = pairs.view(len(weights), groups, size, groups, size).sum(dim=(2, 4))
        return products, along.view(len(weights), groups, size).sum(dim=2)

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
