"""What makes one task's images differ from another's: rotations and permutations, computed when they are needed."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.random_streams import generator


class PixelMap:
    """Builds every output pixel from one input pixel, or from none (0).

    Args:
        source: [pixels] int64, for each output pixel the flat index of its input pixel, or -1.
    """

    def __init__(self, source: Tensor):
        self.source = source.clamp(min=0)
        self.inside = (source >= 0).to(torch.uint8)

    def __call__(self, images: Tensor) -> Tensor:
        """images: [n, height, width] uint8 -> [n, height * width] uint8, on the same device."""
        pixels = images.flatten(1).T.contiguous()  # gathering whole rows is twice as fast as gathering within rows
        moved = pixels.index_select(0, self.source.to(images.device)).T
        return moved if self.inside.all() else moved.mul_(self.inside.to(images.device))


class BilinearRotation:
    """Rotates counter-clockwise by `angle` degrees about the centre with Pillow: bilinear, 0 outside."""

    def __init__(self, angle: float):
        self.angle = angle

    def __call__(self, images: Tensor) -> Tensor:
        """images: [n, height, width] uint8 -> [n, height * width] uint8, on the same device."""
        turned = [
            np.asarray(Image.fromarray(image).rotate(self.angle, Image.Resampling.BILINEAR))
            for image in images.cpu().numpy()
        ]
        return torch.from_numpy(np.stack(turned)).flatten(1).to(images.device)


def nearest_rotation(angle: float, side: int) -> PixelMap:
    """Rotation by `angle` degrees with Pillow's defaults: counter-clockwise, nearest neighbour, 0 outside.

    The map is found by letting Pillow rotate an image of pixel numbers, so it is Pillow's to the pixel.
    """
    numbers = np.arange(1, side * side + 1, dtype=np.int32).reshape(side, side)
    rotated = np.asarray(Image.fromarray(numbers).rotate(angle))
    return PixelMap(torch.from_numpy(rotated.astype(np.int64).ravel() - 1))


def rotations(n_tasks: int, side: int, interpolation: str, stream_seed: int) -> tuple[list[str], list]:
    """Task t's angle is uniform in [180 t / n_tasks, 180 (t+1) / n_tasks) degrees (GEM's protocol, as in MER's files).

    Returns the tasks' names and their shifts.
    """
    bins = 180.0 / n_tasks
    angles = [bins * (t + generator(stream_seed, "rotation angle", t).uniform()) for t in range(n_tasks)]
    shifts = [BilinearRotation(a) if interpolation == "bilinear" else nearest_rotation(a, side) for a in angles]
    return [f"rotated by {a:.2f} degrees" for a in angles], shifts


def permutations(n_tasks: int, pixels: int, stream_seed: int) -> tuple[list[str], list]:
    """Every task, the first included, permutes the pixels in its own fixed random way. Returns names and shifts."""
    orders = [generator(stream_seed, "permutation", t).permutation(pixels) for t in range(n_tasks)]
    return [f"permutation {t}" for t in range(n_tasks)], [PixelMap(torch.from_numpy(order)) for order in orders]
