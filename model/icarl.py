"""iCaRL: classify by the nearest mean of exemplars, in the feature space of a network kept from forgetting."""

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch
from model.gradients import clip_by_norm_, loss_and_gradient
from model.learner import Learner
from utils.errors import UserError
from utils.options import option

#: Examples whose features are computed at once.
CHUNK = 1000

#: The output for a class without exemplars: far below every negative squared distance, and finite.
NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class ICaRLOptions:
    lr: float = option(0.03, "learning rate of SGD", above=0)
    n_memories: int = option(200, "exemplars kept, over all classes together", low=0, high=10**8)
    memory_strength: float = option(1.0, "weight of the distillation loss on exemplars", low=0)
    glances: int = option(1, "updates per incoming batch", low=1, high=1_000_000)
    grad_clip_norm: float = option(2.0, "largest L2 norm of a gradient; 0 turns clipping off", low=0)
    features: Literal["penultimate", "logits"] = option(
        "penultimate",
        "space of the class means: normalised outputs of the last hidden layer, or plain logits, as the 2020 code",
    )

    def check(self, model: str, batch_size: int, classes: int) -> None:
        """Refuses combinations that cannot work, in a sentence."""
        if not self.n_memories:
            raise UserError(f"--n_memories 0 leaves {model} no exemplars: give --n_memories 200, for example.")
        if self.n_memories < classes:
            raise UserError(
                f"--n_memories {self.n_memories} is less than one exemplar for each of {classes} classes: give at least"
                f" {classes}."
            )


def herding(features: Tensor, labels: Tensor, targets: Tensor, m: int) -> Tensor:
    """Exemplars whose mean stays as close to the target as it can, greedily (iCaRL, Algorithm 4), all classes at once.

    The j-th exemplar of class c is the unused example i of c that minimises |target_c - (phi_i + sum of those chosen
    before) / j|. Dropping what does not depend on i, that is |phi_i|^2 - 2 phi_i . (j target_c - sum).

    Args:
        features: phi [replicas, n, d]; labels: [replicas, n], -1 for examples that must not be chosen.
        targets: [replicas, classes, d]; m: exemplars per class.

    Returns: indices [replicas, classes, m] into n, best first, -1 where a class has no more examples.
    """
    replicas, classes, _ = targets.shape
    closed = labels[:, None] != torch.arange(classes, device=labels.device)[None, :, None]
    squares = features.square().sum(dim=2)[:, None]
    total, picks, slack = torch.zeros_like(targets), [], 64 * torch.finfo(features.dtype).eps
    replica = torch.arange(replicas, device=labels.device)[:, None]
    for j in range(1, m + 1):
        scores = torch.baddbmm(squares, j * targets - total, features.mT, alpha=-2).masked_fill(closed, torch.inf)
        lowest = scores.min(dim=2, keepdim=True).values
        # Of equally good ones the first, whatever rounding says: two examples are always equally far from their mean.
        best = (scores <= lowest + slack * (1 + lowest.abs())).to(torch.uint8).argmax(dim=2)
        found = ~closed.gather(2, best[:, :, None])[:, :, 0]
        total += features[replica, best] * found[:, :, None]
        closed.scatter_(2, best[:, :, None], True)
        picks.append(torch.where(found, best, -1))
    return torch.stack(picks, dim=2)


class Exemplars:
    """Up to `capacity` exemplars per replica, with the outputs that the network had for them.

    Attributes, [replicas, cells, ...] each, None before the first task ends: x, y (-1 in empty cells), rank (0 is the
    best of its class), outputs (probabilities).
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.x = self.y = self.rank = self.outputs = None

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        if state["capacity"] != self.capacity:
            raise ValueError(f"the saved state has {state['capacity']} exemplars, expected {self.capacity}")
        for name, value in state.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)


class Pool:
    """The examples of the task being learnt."""

    def __init__(self):
        self.parts: list[Batch] = []

    def state_dict(self) -> dict:
        return {"parts": [tuple(batch) for batch in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        self.parts = [Batch(*(part.clone() for part in batch)) for batch in state["parts"]]


class ICaRL(Learner):
    """theta <- theta - lr * clip(grad [l(theta; B) + memory_strength * KL(q || p(theta))])

    where the second term is the mean over one random exemplar of every class (where tasks have classes of their own:
    the sum over earlier tasks of the mean over their classes, as the 2020 code), and q what the network said of it when
    the last task ended. Predictions are the nearest class mean of exemplars: -|phi(x) - mu_c|^2.

    At the end of each task n_memories / (classes seen) exemplars of every class are chosen by herding; classes that
    were not in the task lose those chosen last. Rebuffi et al. 2017, Algorithms 1 to 5, with the training loss of the
    2020 code. Where tasks share their classes (MNIST's streams), candidates are the new examples and the old exemplars,
    and the target is the mean over tasks of the class: the old exemplars' mean counts once for every task before.
    Unlike the paper's, the target is not scaled back to length 1 (class means for predicting are): no mean of
    exemplars that differ can reach that length, so herding would choose examples that are all alike.
    """

    state = (*Learner.state, "exemplars", "pool", "tasks_seen")

    def __init__(self, network, options: ICaRLOptions, seeds, **where):
        if network.heads is None:  # else as many classes need room as the stream has tasks for, which main.py checks
            options.check("icarl", 1, network.classes)
        super().__init__(network, options, seeds, **where)
        self.exemplars, self.pool = Exemplars(options.n_memories), Pool()
        self.tasks_seen = torch.zeros(len(self.seeds), network.classes, device=self.weights.device)
        self._means: tuple[Tensor, Tensor] | None = None

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._means = None

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        o, batch = self.options, Batch.of(x, y, t)
        self._means = None
        for _ in range(o.glances):
            together, weighting, targets = self._with_exemplars(batch)
            loss, gradient = loss_and_gradient(
                self.network, self.weights, together, weighting=weighting, targets=targets
            )
            self.weights.sub_(clip_by_norm_(gradient, o.grad_clip_norm), alpha=o.lr)
        if self.epoch == 0:
            self.pool.parts.append(batch)
        return loss

    def _with_exemplars(self, batch: Batch) -> tuple[Batch, Tensor | None, Tensor | None]:
        """The batch and one exemplar per class; the weight of each in the loss; and what it should be taken for."""
        kept = self.exemplars
        if kept.y is None or not self.options.memory_strength:
            return batch, None, None
        drawn, known = self._draw_exemplars()
        replica = torch.arange(len(drawn), device=drawn.device)[:, None]
        y = kept.y[replica, drawn].clamp(min=0)
        replayed = Batch(kept.x[replica, drawn], y, self._tasks_of(y))
        group = known.sum(dim=1, keepdim=True) if self.heads is None else self.heads.per_task
        shares = self.options.memory_strength * known / group
        weighting = torch.cat([torch.full_like(batch.y, 1, dtype=shares.dtype) / batch.size, shares], dim=1)
        right = F.one_hot(batch.y, self.network.classes).to(shares.dtype)
        return batch + replayed, weighting, torch.cat([right, kept.outputs[replica, drawn]], dim=1)

    def _tasks_of(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y) if self.heads is None else self.heads.task_of(y)

    def _draw_exemplars(self) -> tuple[Tensor, Tensor]:
        """An exemplar of every class that some replica has one of, [replicas, n], and whether this one has (1 or 0)."""
        labels = self.exemplars.y.cpu().numpy()
        drawn = np.zeros((len(labels), self.network.classes), np.int64)
        known = np.zeros_like(drawn)
        for r, (row, rng) in enumerate(zip(labels, self.random["replay"], strict=True)):
            order = np.argsort(row, kind="stable")
            starts = np.searchsorted(row[order], np.arange(self.network.classes + 1))
            counts = np.diff(starts)
            known[r] = counts > 0
            drawn[r] = order[np.minimum(starts[:-1] + rng.integers(0, np.maximum(counts, 1)), len(row) - 1)]
        some, where = known.any(axis=0), self.weights.device
        return torch.from_numpy(drawn[:, some]).to(where), torch.from_numpy(known[:, some]).to(self.weights)

    def _features(self, x: Tensor) -> Tensor:
        """phi(x), [replicas, n, d]."""
        with torch.no_grad():
            last = self.network if self.options.features == "logits" else self.network.features
            return self._normalised(last(self.weights, x))

    def _class_means(self) -> tuple[Tensor, Tensor]:
        """Mean features of the exemplars, [replicas, classes, d], and how many there are, [replicas, classes]."""
        if self._means is None:
            kept = self.exemplars
            means, counts = self._means_of(self._features(kept.x), kept.y)
            self._means = self._normalised(means), counts
        return self._means

    def _means_of(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean features of each class [replicas, classes, d], and its examples."""
        member = one_hot(labels, self.network.classes).to(features)
        counts = member.sum(dim=1)
        return torch.bmm(member.mT, features) / counts.clamp(min=1)[:, :, None], counts

    def _normalised(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=2) if self.options.features == "penultimate" else features

    def scores(self, x: Tensor) -> Tensor:
        """Negative squared distances to the class means; the network's logits while there are no exemplars."""
        if self.exemplars.y is None:
            return super().scores(x)
        means, counts = self._class_means()
        features = self._features(x)
        cross = torch.bmm(features, means.mT)
        squares = features.square().sum(dim=2)[:, :, None] + means.square().sum(dim=2)[:, None]
        return (2 * cross - squares).masked_fill(counts[:, None] == 0, NEVER)

    def end_task(self, t: int) -> None:
        if not self.pool.parts:
            return
        fresh = Batch(*(torch.cat(part, dim=1) for part in zip(*self.pool.parts, strict=True)))
        self.pool.parts, self._means = [], None
        kept = self.exemplars
        features = torch.cat([self._features(part) for part in fresh.x.split(CHUNK, dim=1)], dim=1)
        if self.options.features == "logits" and self.heads is not None:  # as the 2020 code: the task's own outputs
            features = features * (self.heads.task_of(torch.arange(features.shape[2], device=features.device)) == t)
        means, counts = self._means_of(features, fresh.y)
        here = counts > 0
        x, y = fresh.x, fresh.y
        if kept.y is not None:
            old = self._features(kept.x)
            old_means, _ = self._means_of(old, kept.y)
            share = (self.tasks_seen / (self.tasks_seen + 1))[:, :, None]
            means = means + share * (old_means - means)
            features = torch.cat([old, features], dim=1)
            x, y = torch.cat([kept.x, x], dim=1), torch.cat([kept.y, y], dim=1)
        self.tasks_seen += here
        room = self.options.n_memories // (self.tasks_seen > 0).sum(dim=1)
        candidates = torch.where(here.gather(1, y.clamp(min=0)), y, -1)
        picks = herding(features, candidates, means, min(int(room.max()), y.shape[1]))
        if kept.y is not None:
            self._keep_best(picks, here)
        picks = picks.masked_fill(torch.arange(picks.shape[2], device=y.device) >= room[:, None, None], -1)
        self._store(x, y, picks)

    def _keep_best(self, picks: Tensor, here: Tensor) -> None:
        """Enters the exemplars of the classes that were not in the task into picks, by rank."""
        kept = self.exemplars
        stay = (kept.y >= 0) & ~here.gather(1, kept.y.clamp(min=0)) & (kept.rank < picks.shape[2])
        replica, cell = stay.nonzero(as_tuple=True)
        picks[replica, kept.y[replica, cell], kept.rank[replica, cell]] = cell

    def _store(self, x: Tensor, y: Tensor, picks: Tensor) -> None:
        """Makes the examples at picks [replicas, classes, m], where not -1, the exemplars."""
        kept = self.exemplars
        rank = torch.arange(picks.shape[2], device=y.device).expand_as(picks).flatten(1)
        picks = picks.flatten(1)
        most = int((picks >= 0).sum(dim=1).max())
        order = (picks < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        cells, kept.rank = picks.gather(1, order), rank.gather(1, order)
        replica = torch.arange(len(cells), device=y.device)[:, None]
        kept.x = x[replica, cells.clamp(min=0)]
        kept.y = torch.where(cells >= 0, y[replica, cells.clamp(min=0)], -1)
        with torch.no_grad():
            logits = torch.cat([self.network(self.weights, part) for part in kept.x.split(CHUNK, dim=1)], dim=1)
            kept.outputs = self.network.to_learn(logits, self._tasks_of(kept.y.clamp(min=0))).softmax(dim=2)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """[replicas, n] -> [replicas, n, classes] of 0 and 1; a label of -1 belongs to no class."""
    return (labels[:, :, None] == torch.arange(classes, device=labels.device)).float()
