"""Random changes of training images: batched tensor operations on the device, drawn on the host per replica."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

#: Pixels of black around an image that is cropped.
PADDING = 4


def crop_and_flip(x: Tensor, rngs) -> Tensor:
    """Each image padded with black, cropped to its size at a random place, and mirrored with probability 1/2.

    x: [replicas, batch, channels, height, width]. rngs: one NumPy generator per replica.
    """
    replicas, batch, _, height, width = x.shape
    places = np.stack([rng.integers(0, 2 * PADDING + 1, (batch, 2)) for rng in rngs])
    mirrored = np.stack([rng.random(batch) < 0.5 for rng in rngs])
    places, mirrored = (torch.from_numpy(drawn).to(x.device) for drawn in (places, mirrored))
    columns = torch.arange(width, device=x.device).expand(replicas, batch, width)
    columns = torch.where(mirrored[:, :, None], width - 1 - columns, columns) + places[:, :, 1:]
    rows = torch.arange(height, device=x.device) + places[:, :, :1]
    padded = F.pad(x, (PADDING,) * 4)
    replica = torch.arange(replicas, device=x.device)[:, None, None, None]
    number = torch.arange(batch, device=x.device)[:, None, None]
    cropped = padded.permute(0, 1, 3, 4, 2)[replica, number, rows[:, :, :, None], columns[:, :, None, :]]
    return cropped.permute(0, 1, 4, 2, 3)


def brighten(x: Tensor, rngs, by: float) -> Tensor:
    """Each image times a factor drawn uniformly from [1 - by, 1 + by], within 0 to 255; floats.

    Pillow, as the 2020 code uses it, rounds down to whole numbers afterwards; this does not.
    """
    factors = np.stack([rng.uniform(1 - by, 1 + by, x.shape[1]) for rng in rngs])
    factors = torch.from_numpy(factors).to(device=x.device, dtype=torch.float32)
    return (x.float() * factors[:, :, None, None, None]).clamp_(0, 255)
