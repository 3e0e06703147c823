"""Episodes of meta-training, and the meta-gradient of one: what OML and ANML share."""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.networks.base import Network, Scope
from model.networks.losses import cross_entropy
from utils.options import option


class Episode(NamedTuple):
    """What one step of meta-training learns from.

    x: [replicas, images, *input shape]; y: [replicas, images], classes. The first `inner` images are learnt one after
    the other; then the meta-loss is taken on all from number `outer` on.
    """

    x: Tensor
    y: Tensor
    inner: int
    outer: int


@dataclasses.dataclass(frozen=True)
class EpisodeOptions:
    """What an episode is made of. Defaults are ANML's."""

    meta_iterations: int = option(
        0, "steps of meta-training before the stream begins, on its background classes", low=0, high=10**7,
        flags=("steps",),
    )  # fmt: skip
    meta_lr: float = option(
        0.001, "learning rate of the outer loop's Adam in meta-training", above=0, flags=("outer_lr",)
    )
    episode_classes: int = option(1, "classes that an episode learns one after the other", low=1, high=40)
    episode_images: int = option(20, "images of each of them, of its 20", low=1, high=20, flags=("update_step",))
    remember_images: int = option(
        64, "random images of all classes that the meta-loss is also taken on", low=0, high=900
    )
    fresh: bool = option(
        False,
        "the meta-loss is on other images of the episode's classes, as in OML, instead of on those just learnt, as in"
        " ANML",
    )
    split_classes: bool = option(
        False, "episodes learn classes of the second half and remember those of the first, as OML's program"
    )


def draw_episode(images: Tensor, rngs, options, to_float) -> Episode:
    """A fresh episode for every replica.

    Args:
        images: raw, [classes, n, *input shape]; the class is the label. rngs: one NumPy generator per replica.
        options: EpisodeOptions. to_float: raw images -> network input.
    """
    o, (classes, n) = options, images.shape[:2]
    half = classes // 2 if o.split_classes else 0
    inner = o.episode_classes * o.episode_images
    rows = []
    for rng in rngs:
        chosen = half + rng.choice(classes - half, o.episode_classes, replace=False)
        drawn = [c * n + rng.permutation(n)[: o.episode_images * (1 + o.fresh)] for c in chosen]
        parts = [d[: o.episode_images] for d in drawn] + [d[o.episode_images :] for d in drawn]
        rows.append(np.concatenate([*parts, rng.choice((half or classes) * n, o.remember_images, replace=False)]))
    index = torch.from_numpy(np.stack(rows)).to(images.device)
    return Episode(to_float(images.flatten(0, 1)[index]), index // n, inner, inner if o.fresh else 0)


def meta_gradient(
    network: Network, weights: Tensor, episode: Episode, rate: float, scope: Scope, second_order: bool
) -> tuple[Tensor, Tensor]:
    """The meta-loss after one step of SGD on each inner image in turn, and its gradient.

        phi_0 = the scope's weights;  phi_k = phi_{k-1} - rate * grad l(phi_{k-1}; image k);  L = mean l(phi_K; outer)

    This is look_ahead with rates of 0 outside the scope and meta_loss "last" (tests/test_oml.py), but nothing
    outside the scope is differentiated inside: what those weights compute (features; gates) is computed once for all
    images of the episode, which is exact, as they do not change in it. In second order, a reverse accumulation as in
    lookahead._second_order; the mixed derivatives by gates or features come out of the same products.

    Args:
        weights: [replicas, parameters]; not changed. scope: what the inner loop changes.

    Returns: L [replicas] and dL/dweights [replicas, parameters]. In first order the inner gradients are constants.
    """
    layout = network.scope_layout(scope)
    low = weights.detach().requires_grad_()
    with torch.enable_grad():
        below = network.below(low, episode.x, scope)

    def derivatives(phi: Tensor, images: slice, create_graph: bool = False):
        """The loss on some images; by what it is differentiated, which is the scope's tensors and what lies below; and
        the derivatives."""
        by = [tensor.detach().requires_grad_() for tensor in layout.tensors(phi)]
        given = None if below is None else below[:, images].detach().requires_grad_()
        y = episode.y[:, images]
        with torch.enable_grad():
            loss = cross_entropy(network.above(by, episode.x[:, images], given, scope), Batch(episode.x, y, y))
        by += [] if given is None else [given]
        return loss.detach(), by, torch.autograd.grad(loss.sum(), by, create_graph=create_graph)

    phi, path = weights[:, network.first_column(scope) :].clone(), []
    for k in range(episode.inner):
        if second_order:
            path.append(phi.clone())
        _, _, gradients = derivatives(phi, slice(k, k + 1))
        for tensor, gradient in zip(layout.tensors(phi), gradients, strict=False):
            tensor.sub_(gradient, alpha=rate)
    loss, _, gradients = derivatives(phi, slice(episode.outer, None))
    adjoint = torch.empty_like(phi)
    adjoints = layout.tensors(adjoint)
    for tensor, gradient in zip(adjoints, gradients, strict=False):
        tensor.copy_(gradient)
    by_below = None if below is None else torch.zeros_like(below)
    if by_below is not None:
        by_below[:, episode.outer :] = gradients[-1]
    for k in reversed(range(len(path))):
        _, by, gradients = derivatives(path[k], slice(k, k + 1), create_graph=True)
        products = torch.autograd.grad(gradients[: len(adjoints)], by, adjoints)
        for tensor, product in zip(adjoints, products, strict=False):
            tensor.sub_(product, alpha=rate)
        if by_below is not None:
            by_below[:, k : k + 1].sub_(products[-1], alpha=rate)
    gradient = torch.zeros_like(weights) if below is None else torch.autograd.grad(below, low, by_below)[0]
    gradient[:, network.first_column(scope) :] += adjoint
    return loss, gradient
