"""Meta-experience replay: Reptile over chains of single-example SGD steps on new and remembered examples.

Riemer et al., "Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference", ICLR 2019:
Algorithm 1 (`mer`), Algorithm 6 (`mer_alg6`) and Algorithm 7 (`mer_alg7`).
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.gradients import sgd_chain_
from model.learner import Learner
from model.memory import EpochReplayOptions, Reservoir
from utils.options import option


@dataclasses.dataclass(frozen=True)
class _MEROptions(EpochReplayOptions):
    lr: float = option(0.03, "learning rate of the single-example SGD steps", above=0)
    gamma: float = option(
        1.0, "fraction of the way to the adapted weights that is kept (mer: across batches; 0 to 1)", low=0, high=1
    )
    grad_clip_norm: float = option(0.0, "largest L2 norm of a single-example gradient; 0 turns clipping off", low=0)


@dataclasses.dataclass(frozen=True)
class MEROptions(_MEROptions):
    beta: float = option(0.03, "fraction of the way that is kept within a batch (0 to 1)", low=0, high=1)
    batches_per_example: int = option(10, "batches learnt from per incoming example", low=1, high=1_000_000)


@dataclasses.dataclass(frozen=True)
class MERAlg6Options(_MEROptions):
    batches_per_example: int = option(1, "batches learnt from per incoming example", low=1, high=1_000_000)


@dataclasses.dataclass(frozen=True)
class MERAlg7Options(_MEROptions):
    s: float = option(5.0, "factor on the learning rate of the incoming example", above=0)


class _MER(Learner):
    """What the three algorithms share: examples come one at a time, each is learnt with replayed ones, then offered
    to the memory."""

    state = (*Learner.state, "memory")
    replays = True

    def __init__(self, network, options, seeds, **where):
        super().__init__(network, options, seeds, **where)
        self.memory = Reservoir(options.memories, self.random, options.reservoir, options.replacement)

    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        arrived = Batch.of(x, y, t)
        losses = []
        for example in arrived.split(arrived.size):
            losses.append(self._learn(example))
            if self.options.remembers(self.epoch):
                self.memory.add(example)
        return torch.stack(losses).mean(dim=0)

    def _learn(self, example: Batch) -> Tensor:
        """Learns from one example of each replica; returns its losses [replicas]."""
        raise NotImplementedError

    def _replayed(self, example: Batch, repetition: int = 0) -> Batch | None:
        """A fresh draw to learn beside the example, in random order."""
        replayed = self.memory.sample(self.options.replay_batch_size, in_random_order=True)
        if self.alignment and repetition == 0:
            self.alignment.add(self.network, self.weights, example, replayed)
        return replayed

    def _chain(self, batch: Batch, keep: float, factors: Tensor | float = 1.0) -> Tensor:
        """theta <- theta + keep * (SGD over the batch, one example at a time, from theta - theta)."""
        rates = torch.as_tensor(self.options.lr * factors, dtype=self.weights.dtype, device=self.weights.device)
        return sgd_chain_(self.network, self.weights, batch, rates, keep, self.options.grad_clip_norm)


class MER(_MER):
    """Algorithm 1. For each incoming example:

    theta_A <- theta
    repeat batches_per_example times, with a fresh draw M_k:
        theta_B <- theta;  SGD on the example, then on each of M_k
        theta <- theta_B + beta * (theta - theta_B)           within-batch Reptile
    theta <- theta_A + gamma * (theta - theta_A)              across-batch Reptile
    """

    def _learn(self, example: Batch) -> Tensor:
        o = self.options
        start = self.weights if o.gamma == 1 else self.weights.clone()
        for repetition in range(o.batches_per_example):
            losses = self._chain(example + self._replayed(example, repetition), o.beta)
            if repetition == 0:
                first = losses[:, 0]
        if o.gamma != 1:
            self.weights = start.lerp_(self.weights, o.gamma)
        return first


class MERAlg6(_MER):
    """Algorithm 6: a chain over the replayed examples and then the incoming one, and one interpolation, with gamma."""

    def _learn(self, example: Batch) -> Tensor:
        for repetition in range(self.options.batches_per_example):
            replayed = self._replayed(example, repetition)
            batch = example if replayed is None else replayed + example
            losses = self._chain(batch, self.options.gamma)
            if repetition == 0:
                first = losses[:, -1]
        return first


class MERAlg7(_MER):
    """Algorithm 7: one chain in random order, in which the incoming example has s times the learning rate.

    The paper learns from the first example of the stream as from any other; the published code only stores it.
    """

    def _learn(self, example: Batch) -> Tensor:
        batch = example + self._replayed(example)
        order = self._orders(batch)
        incoming = order == 0
        factors = torch.where(incoming, self.options.s, 1.0).to(self.weights.dtype)
        losses = self._chain(batch.take(order), self.options.gamma, factors)
        return losses[incoming]

    def _orders(self, batch: Batch) -> Tensor:
        """A fresh order of the batch for each replica, [replicas, batch]."""
        orders = np.stack([rng.permutation(batch.size) for rng in self.random["chain order"]])
        return torch.from_numpy(orders).to(batch.y.device)
