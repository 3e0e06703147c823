"""The networks of the OML and ANML papers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.batch import Batch
from model.gradients import hessian_product, loss_and_gradient
from model.networks.blocks import Block, BlockNet, anml_blocks, oml_blocks


def rngs(n):
    return [np.random.default_rng(seed) for seed in range(n)]


def parts(network):
    """Parameters of the blocks, and of the linear layer."""
    head = sum(int(np.prod(s)) for name, s in network.layout.shapes.items() if name.startswith("head"))
    return network.layout.parameters - head, head


def test_the_published_networks_have_the_published_parameters():
    assert parts(BlockNet((1, 28, 28), anml_blocks(256), 1000)) == (1_184_256, 2_305_000)
    assert BlockNet((1, 28, 28), anml_blocks(112), 2304).layout.parameters == 2_552_544
    assert parts(BlockNet((1, 84, 84), oml_blocks(256), 1000)) == (2_952_960, 2_305_000)


def test_what_comes_out_of_each_block():
    assert [anml_blocks(256)[0].side(28), anml_blocks(256)[1].side(13), anml_blocks(256)[2].side(5)] == [13, 5, 3]
    sides = [84]
    for block in oml_blocks(256):
        sides.append(block.side(sides[-1]))
    assert sides == [84, 41, 39, 19, 17, 8, 3]


SMALL = (Block(4, pool=True), Block(3, stride=2, norm=False), Block(3))


def test_replicas_are_plain_networks():
    network = BlockNet((2, 20, 20), SMALL, 5)
    weights = network.initial_weights(rngs(3), torch.float64)
    weights += 0.1 * torch.randn_like(weights)
    x = torch.randn(3, 4, 2, 20, 20, dtype=torch.float64)
    packed = network(weights, x)
    for r in range(3):
        part = {name: values[r] for name, values in network.layout.named(weights).items()}
        h = F.conv2d(x[r], part["conv1.weight"], part["conv1.bias"])
        h = F.max_pool2d(F.instance_norm(h, weight=part["norm1.weight"], bias=part["norm1.bias"]).relu(), 2)
        h = F.conv2d(h, part["conv2.weight"], part["conv2.bias"], stride=2).relu()
        h = F.conv2d(h, part["conv3.weight"], part["conv3.bias"])
        h = F.instance_norm(h, weight=part["norm3.weight"], bias=part["norm3.bias"]).relu().flatten(1)
        torch.testing.assert_close(packed[r], F.linear(h, part["head.weight"], part["head.bias"]))
        torch.testing.assert_close(network.features(weights, x)[r], h)
    assert network.narrowed(3).layout.shapes["conv1.weight"] == (1, 2, 3, 3)


def test_the_norm_is_batch_norm_on_batches_of_one_as_in_the_published_code():
    network = BlockNet((1, 9, 9), (Block(3),), 2)
    weights = network.initial_weights(rngs(1), torch.float64)
    part = {name: values[0] for name, values in network.layout.named(weights).items()}
    assert (part["norm1.weight"] == 1).all() and (part["norm1.bias"] == 0).all() and (part["conv1.bias"] == 0).all()
    x = torch.randn(1, 5, 1, 9, 9, dtype=torch.float64)
    found = network.features(weights, x)[0]
    for i in range(5):
        h = F.conv2d(x[0, i : i + 1], part["conv1.weight"], part["conv1.bias"])
        h = F.batch_norm(h, None, None, part["norm1.weight"], part["norm1.bias"], training=True).relu()
        torch.testing.assert_close(found[i], h.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3])
def test_hessian_product_equals_differences_of_gradients(n):
    network = BlockNet((1, 12, 12), (Block(3, pool=True), Block(2)), 4)
    weights = network.initial_weights(rngs(2), torch.float64)
    batch = Batch.of(torch.randn(2, n, 1, 12, 12, dtype=torch.float64), torch.randint(4, (2, n)), 0)
    vector, eps = torch.randn_like(weights), 1e-6
    ahead, behind = (loss_and_gradient(network, weights + s * vector, batch)[1] for s in (eps, -eps))
    found = hessian_product(network, weights, batch, vector)
    torch.testing.assert_close(found, (ahead - behind) / (2 * eps), rtol=1e-4, atol=1e-6)
