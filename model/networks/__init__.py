"""Networks as functions of their weights, with a replica axis.

All weights of a replica are one row of a matrix [replicas, parameters]; a network holds no weights, only the layout
that turns such a matrix into named tensors. So a look-ahead step, a norm, an inner product of gradients or an
interpolation is one tensor operation whatever the architecture, and code for it is written once.
"""

import dataclasses
import math
from typing import Literal

from model.networks.base import Layout, Network
from model.networks.blocks import BlockNet, anml_blocks, oml_blocks
from model.networks.convolutional import ConvNet
from model.networks.heads import Heads
from model.networks.losses import cross_entropy
from model.networks.mlp import MLP
from utils.errors import UserError
from utils.options import option

__all__ = ["MLP", "ConvNet", "Heads", "Layout", "Network", "NetworkOptions", "build_network", "cross_entropy"]

#: Networks made of blocks: name -> blocks of so many channels.
BLOCKS = {"anml_cnn": anml_blocks, "oml_cnn": oml_blocks}


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    arch: Literal["linear", "pc_cnn", "anml_cnn", "oml_cnn"] = option(
        "linear",
        "network: linear is a multi-layer perceptron with ReLU, pc_cnn convolutions of stride 2 with ReLU; anml_cnn and"
        " oml_cnn are those papers', for images of 28 and 84 pixels",
    )
    n_hiddens: int = option(100, "linear: units of each hidden layer", low=1, high=10**6)
    n_layers: int = option(2, "linear: number of hidden layers", low=0, high=100)
    channels: int = option(160, "all but linear: channels of each convolution", low=1, high=10_000)
    init: Literal["kaiming_normal", "xavier_normal", "xavier_uniform"] = option(
        "kaiming_normal", "distribution of the initial weights (biases start at 0)"
    )

    def check(self, images: bool) -> None:
        """UserError if the network is not for such examples: images, or flat ones."""
        if images == (self.arch == "linear"):
            raise UserError(
                f"--arch {self.arch} takes {'flat examples' if images else 'images'}, and this --dataset has"
                f" {'images' if images else 'flat examples'}: give --arch {'pc_cnn' if images else 'linear'}."
            )


def build_network(options: NetworkOptions, input_shape, classes: int, heads: Heads | None = None) -> Network:
    """The network that `options` describe, for examples of `input_shape`. UserError if they do not fit."""
    options.check(len(input_shape) == 3)
    if options.arch == "linear":
        return MLP(math.prod(input_shape), [options.n_hiddens] * options.n_layers, classes, options.init)
    if options.arch in BLOCKS:
        network = BlockNet(input_shape, BLOCKS[options.arch](options.channels), classes, options.init)
        network.heads = heads
        return network
    step = 8 if input_shape[1] < 64 else 16
    if any(side < step or side % step for side in input_shape[1:]):
        raise UserError(
            f"--arch pc_cnn halves images three times (four from 64 pixels on), and these are {input_shape[1]} x"
            f" {input_shape[2]}: give another --arch, such as anml_cnn, or choose another --dataset."
        )
    network = ConvNet(input_shape, options.channels, classes, options.init)
    network.heads = heads
    return network
