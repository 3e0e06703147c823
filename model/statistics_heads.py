"""Classifiers that learn by counting: the nearest class mean, and a Gaussian for each class and feature."""

import torch
from torch import Tensor

from model.icarl import NEVER

#: A feature's common variance is at least this fraction of the mean over features: some never change.
LEAST_VARIANCE = 0.01


class StatisticsHead:
    """Counts, sums and sums of squares of each class's features; what comes out depends on no order.

    "prototype": minus the squared distance to the class's mean. "gaussian": the log-density of the Bayesian predictive
    distribution, as GeMCL's head (Banayeeanzade et al. 2021, "Generative vs. Discriminative: Rethinking The
    Meta-Continual Learning"). Of each class and feature mean and precision have a normal-gamma prior, in the limit
    in which it says nothing of the mean; with n examples of mean m and sum of squared deviations S,

        a = a0 + n / 2;  b = b0 + S / 2;  p(z) = Student-t, 2 a degrees of freedom, at m, scale^2 = b (n + 1) / (a n)

    GeMCL meta-trains a0 and b0. Here a0 = prior / 2, and b0 = a0 times the feature's variance within the classes met so
    far, pooled.

    Args:
        kind: prototype or gaussian. prior: examples that the prior counts for.
    """

    def __init__(self, kind: str, prior: float):
        self.kind, self.prior = kind, prior
        self.sums: list[Tensor] = []

    def add(self, features: Tensor, y: Tensor, classes: int) -> None:
        """features: [replicas, batch, units]; y: [replicas, batch]."""
        if not self.sums:
            replicas, _, units = features.shape
            count = features.new_zeros(replicas, classes)
            self.sums = [count, *(features.new_zeros(replicas, classes, units) for _ in range(2))]
        replica = torch.arange(len(y), device=y.device)[:, None].expand_as(y)
        terms = torch.ones_like(features[..., 0]), features, features.square()
        for total, term in zip(self.sums, terms, strict=True):
            total.index_put_((replica, y), term, accumulate=True)

    def scores(self, features: Tensor, classes: int) -> Tensor:
        """[replicas, batch, classes]; NEVER for classes without examples."""
        if not self.sums:
            return features.new_full((*features.shape[:2], classes), NEVER)
        count, total, squares = self.sums
        known = count.amax(dim=0) > 0
        n = count[:, known].clamp(min=1)[..., None]
        mean = total[:, known] / n
        if self.kind == "prototype":
            scores = 2 * features @ mean.mT - mean.square().sum(dim=2)[:, None]
        else:
            deviations = (squares[:, known] - n * mean.square()).clamp(min=0)
            scores = self._log_density(features, n, mean, deviations)
        found = features.new_full((*features.shape[:2], classes), NEVER)
        found[..., known] = scores.masked_fill(count[:, None, known] == 0, NEVER)
        return found

    def _log_density(self, features: Tensor, n: Tensor, mean: Tensor, deviations: Tensor) -> Tensor:
        """n: [replicas, known, 1]; mean, deviations: [replicas, known, units]."""
        freedom = (n - 1).sum(dim=1).clamp(min=1)
        common = deviations.sum(dim=1) / freedom
        common = common.clamp(min=1e-12).maximum(LEAST_VARIANCE * common.mean(dim=1, keepdim=True))
        a = (self.prior + n) / 2
        b = self.prior / 2 * common[:, None] + deviations / 2
        scale = b * (n + 1) / (a * n)
        units = mean.shape[2]
        constant = units * (torch.lgamma(a + 0.5) - torch.lgamma(a) - a.log() / 2)[..., 0] - scale.log().sum(dim=2) / 2
        weight = 1 / (2 * a * scale)
        images, classes = (64, 64) if features.is_cuda else (1, 64)  # on a CPU, what its caches hold
        rows = []
        for some in features.split(images, dim=1):
            parts = zip(mean.split(classes, dim=1), weight.split(classes, dim=1), strict=True)
            sums = [(some[:, :, None] - m[:, None]).square_().mul_(w[:, None]).log1p_().sum(dim=3) for m, w in parts]
            rows.append(torch.cat(sums, dim=2))
        return constant[:, None] - (a + 0.5)[:, None, :, 0] * torch.cat(rows, dim=1)

    def state_dict(self) -> dict:
        return {"sums": self.sums}

    def load_state_dict(self, state: dict) -> None:
        self.sums = [total.clone() for total in state["sums"]]
