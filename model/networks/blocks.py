"""The convolutional networks of the OML and ANML papers: blocks of convolution, norm, ReLU, pooling; a linear layer."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from model.networks.base import Layout, Network
from utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Block:
    """A convolution of 3 x 3 without padding, then ReLU.

    norm: instance norm, with a scale and a shift per channel, between the two. pool: then the largest of each 2 x 2.
    """

    channels: int
    stride: int = 1
    norm: bool = True
    pool: bool = False

    def side(self, side: int) -> int:
        """Pixels a side of what comes out, of images of `side` pixels a side."""
        side = (side - 3) // self.stride + 1
        return side // 2 if self.pool else side


def anml_blocks(channels: int) -> tuple[Block, ...]:
    """Beaulieu et al. 2020: 256 channels make 2,304 numbers of 28 x 28 pixels; the neuromodulatory network has 112."""
    return Block(channels, pool=True), Block(channels, pool=True), Block(channels)


def oml_blocks(channels: int) -> tuple[Block, ...]:
    """Javed and White 2019, their repository since July 2020: 256 channels make 2,304 numbers of 84 x 84 pixels."""
    return tuple(Block(channels, stride, norm=False) for stride in (2, 1, 2, 1, 2, 2))


class BlockNet(Network):
    """Blocks, then one linear layer.

    Norms are of each image and channel alone, so an image is seen the same whatever it comes with; the published ANML
    code gets the same from batch norm on batches of one.

    Args:
        shape: channels, height and width of the images. blocks: see Block. classes: outputs. init: see NetworkOptions.
    """

    #: Added to variances, as PyTorch's norms do.
    EPS = 1e-5

    def __init__(
        self, shape: tuple[int, int, int], blocks: tuple[Block, ...], classes: int, init: str = "kaiming_normal"
    ):
        self.shape, self.blocks, self.classes, self.init = shape, blocks, classes, init
        shapes, (below, height, width) = {}, shape
        for i, block in enumerate(blocks, start=1):
            shapes[f"conv{i}.weight"], shapes[f"conv{i}.bias"] = (block.channels, below, 3, 3), (block.channels,)
            if block.norm:
                shapes[f"norm{i}.weight"] = shapes[f"norm{i}.bias"] = (block.channels,)
            below, height, width = block.channels, block.side(height), block.side(width)
            if min(height, width) < 1:
                raise UserError(
                    f"images of {shape[1]} x {shape[2]} pixels are too small for {len(blocks)} blocks of convolutions:"
                    " give --arch anml_cnn, or, for --dataset omniglot, --image_size 84."
                )
        shapes |= {"head.weight": (classes, below * height * width), "head.bias": (classes,)}
        self.layout = Layout(shapes)

    def initial_weights(self, rngs, dtype=torch.float32) -> Tensor:
        """As every network's, and scales of norms are 1."""
        weights = super().initial_weights(rngs, dtype)
        for name, tensor in self.layout.named(weights).items():
            if name.startswith("norm") and name.endswith(".weight"):
                tensor.fill_(1)
        return weights

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """weights: [replicas, parameters], x: [replicas, batch, *shape] -> logits [replicas, batch, classes]."""
        tensors = self.layout.tensors(weights)
        return self.classify(tensors, self.features(tensors, x))

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """What the linear layer sees, [replicas, batch, units]; arguments as of a call."""
        tensors = self.layout.named(weights)
        replicas, batch = x.shape[:2]
        h = x.transpose(0, 1).flatten(1, 2)  # replicas side by side as groups of channels
        for i, block in enumerate(self.blocks, start=1):
            weight, bias = tensors[f"conv{i}.weight"].flatten(0, 1), tensors[f"conv{i}.bias"].flatten()
            h = F.conv2d(h, weight, bias, stride=block.stride, groups=replicas)
            if block.norm:
                scale, shift = tensors[f"norm{i}.weight"].flatten(), tensors[f"norm{i}.bias"].flatten()
                h = F.group_norm(h, replicas * block.channels, scale, shift, self.EPS)
            if block.pool:
                h = F.max_pool2d(h, 2)
            h = h.relu()  # after the pooling: the same, on a quarter of the numbers
        return h.reshape(batch, replicas, -1).transpose(0, 1)

    def narrowed(self, by: float, classes: int | None = None) -> "BlockNet":
        blocks = tuple(
            dataclasses.replace(block, channels=max(1, int(block.channels / by + 1e-9))) for block in self.blocks
        )
        network = BlockNet(self.shape, blocks, classes or self.classes, self.init)
        network.heads = self.heads
        return network
