"""Memories in preallocated tensors: a uniform sample of everything seen, and the last examples of each task."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from utils.errors import UserError
from utils.options import option
from utils.random_streams import RandomStreams


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """What every algorithm with a reservoir takes."""

    memories: int = option(200, "examples the replay memory holds, over all tasks together", low=0, high=10**8)
    replay_batch_size: int = option(10, "examples replayed beside each incoming batch", low=0, high=10**6)
    reservoir: Literal["uniform", "inclusive"] = option(
        "uniform",
        "how the memory is filled: uniform is Vitter's algorithm R; inclusive draws from one index more, as the 2020"
        " code does, which favours older examples slightly",
    )
    replacement: bool = option(False, "draw replayed examples with replacement, as the 2020 code does")

    def check(self, model: str, batch_size: int, classes: int) -> None:
        """Refuses combinations that cannot work, in a sentence."""
        if self.replay_batch_size and not self.memories:
            raise UserError(
                f"--memories 0 leaves {model} nothing to replay: give --memories 200, or choose --model online."
            )


@dataclasses.dataclass(frozen=True)
class EpochReplayOptions(ReplayOptions):
    """What the algorithms take whose published programs fill the reservoir in every epoch."""

    remember: Literal["first_epoch", "every_epoch"] = option(
        "first_epoch",
        "epochs whose examples are offered to the memory; every_epoch offers each again, as the 2020 code does",
    )

    def remembers(self, epoch: int) -> bool:
        return epoch == 0 or self.remember == "every_epoch"


@dataclasses.dataclass(frozen=True)
class RingOptions:
    """What every algorithm with a memory of its own for each task takes."""

    n_memories: int = option(10, "examples kept of each task", low=0, high=10**8)

    def check(self, model: str, batch_size: int, classes: int) -> None:
        """Refuses combinations that cannot work, in a sentence."""
        if not self.n_memories:
            raise UserError(f"--n_memories 0 leaves {model} nothing to remember: give --n_memories 10, for example.")
        if batch_size > self.n_memories:
            raise UserError(
                f"--batch_size {batch_size} is more than the --n_memories {self.n_memories} that {model} keeps of each"
                f" task: give --n_memories {batch_size}, or a smaller batch."
            )


class Reservoir:
    """A memory of `capacity` examples per replica, each example ever added being in it with equal probability.

    Algorithm R (Vitter 1985; Algorithm 3 of the MER paper): example number n replaces slot p, drawn uniformly from
    {0 .. n-1}, if p < capacity. With rule "inclusive" p is drawn from {0 .. n}, as in the published La-MAML and MER
    code. Adding and drawing cost O(1) per example.

    Args:
        capacity: examples per replica.
        random: the learner's streams; "reservoir" decides what is kept, "replay" what is drawn, so that drawing more
            or less never changes what is kept.
        rule, replacement: see ReplayOptions.

    Storage is taken from the first batch added: x [replicas, capacity, *input shape], y and t [replicas, capacity].
    """

    def __init__(self, capacity: int, random: RandomStreams, rule: str = "uniform", replacement: bool = False):
        self.capacity, self.random, self.rule, self.replacement = capacity, random, rule, replacement
        self.seen = 0
        self.stored: Batch | None = None
        self.frozen: Batch | None = None

    def __len__(self) -> int:
        """Examples held, the same in every replica."""
        return min(self.seen, self.capacity)

    def add(self, batch: Batch) -> None:
        """Offers every example of the batch, in order."""
        if not self.capacity:
            return
        if self.stored is None:
            self.stored = _room(batch, self.capacity)
        numbers = self.seen + np.arange(batch.size)
        choices = numbers + (2 if self.rule == "inclusive" else 1)
        writes = []
        for replica, rng in enumerate(self.random["reservoir"]):
            drawn = rng.integers(0, choices)
            slots = np.where(numbers < self.capacity, numbers, drawn)
            last_writer = {slot: example for example, slot in enumerate(slots.tolist()) if slot < self.capacity}
            writes += [(replica, slot, example) for slot, example in last_writer.items()]
        self.seen += batch.size
        if writes:
            replica, slot, example = torch.tensor(writes, device=batch.y.device).T
            for kept, new in zip(self.stored, batch, strict=True):
                kept[replica, slot] = new[replica, example]

    def sample(self, n: int, in_random_order: bool = False) -> Batch | None:
        """Up to n examples of each replica, drawn uniformly from what is held (or was, at `freeze`); None if empty.

        Their order means nothing (the newest tend to come last) unless it is asked to be random.
        """
        held = self.stored if self.frozen is None else self.frozen
        size = len(self) if self.frozen is None else self.frozen.size
        n = min(n, size)
        if not n:
            return None
        if self.replacement:
            drawn = [rng.integers(0, size, n) for rng in self.random["replay"]]
        else:
            drawn = [rng.choice(size, n, replace=False, shuffle=in_random_order) for rng in self.random["replay"]]
        return held.take(torch.from_numpy(np.stack(drawn)).to(held.y.device))

    def freeze(self) -> None:
        """From now on `sample` draws from what is held at this moment; `add` goes on as before."""
        self.frozen = None if self.stored is None else Batch(*(part[:, : len(self)].clone() for part in self.stored))

    def thaw(self) -> None:
        """`sample` draws from the live memory again."""
        self.frozen = None

    def state_dict(self) -> dict:
        return {"seen": self.seen, "stored": _plain(self.stored), "frozen": _plain(self.frozen)}

    def load_state_dict(self, state: dict) -> None:
        stored, expected = state["stored"], (len(self.random.seeds), self.capacity)
        if stored is not None and tuple(stored[1].shape) != expected:
            raise ValueError(f"the saved memory is {tuple(stored[1].shape)} (replicas, examples), expected {expected}")
        self.seen = state["seen"]
        self.stored, self.frozen = (
            None if part is None else Batch(*(values.clone() for values in part)) for part in (stored, state["frozen"])
        )


class Earlier(NamedTuple):
    """What `TaskRings.before` returns.

    batch: the examples, `size` cells for each of the tasks, one after the other. shares: the weight of each in the mean
    loss of its task, 0 for a cell that is empty, [cells]. written: indices of the cells that are not.
    """

    tasks: list[int]
    size: int
    batch: Batch
    shares: Tensor
    written: np.ndarray


class TaskRings:
    """The last `capacity` examples of every task, per replica (GEM's and EWC's memory).

    The published memory has one write pointer for all tasks and reads cells that were never written when a task ends
    early; here a task's examples are its own, whatever the batch size.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.rings: dict[int, Batch] = {}
        self.seen: dict[int, int] = {}
        self._earlier: Earlier | None = None

    def filled(self, t: int) -> int:
        """Examples held of task t, the same in every replica."""
        return min(self.seen.get(t, 0), self.capacity)

    def add(self, t: int, batch: Batch) -> None:
        """Puts every example of the batch, all of task t, over the oldest of that task."""
        if t not in self.rings:
            self.rings[t] = _room(batch, self.capacity)
            self.seen[t] = 0
        numbers = torch.arange(self.seen[t], self.seen[t] + batch.size)[-self.capacity :]
        slots = (numbers % self.capacity).to(batch.y.device)
        for kept, new in zip(self.rings[t], batch, strict=True):
            kept[:, slots] = new[:, -len(slots) :]
        self.seen[t] += batch.size
        if self._earlier is not None and t in self._earlier.tasks:
            self._earlier = None

    def of(self, t: int) -> Batch:
        """What is held of task t."""
        return Batch(*(part[:, : self.filled(t)] for part in self.rings[t]))

    def before(self, t: int, skip: int = 0) -> Earlier | None:
        """What is held of the tasks seen before t, without the first `skip` of them; None if that is nothing."""
        known = list(self.rings)
        tasks = known[: known.index(t) if t in known else len(known)][skip:]
        if not tasks:
            return None
        if self._earlier is None or self._earlier.tasks != tasks:
            filled = [self.filled(task) for task in tasks]
            size = max(filled)
            parts = zip(*(self.rings[task] for task in tasks), strict=True)
            batch = Batch(*(torch.cat([ring[:, :size] for ring in rings], dim=1) for rings in parts))
            shares = (torch.arange(size) < torch.tensor(filled)[:, None]) / torch.tensor(filled)[:, None]
            shares = shares.flatten().to(batch.x)
            self._earlier = Earlier(tasks, size, batch, shares, shares.cpu().numpy().nonzero()[0])
        return self._earlier

    def state_dict(self) -> dict:
        rings = {t: tuple(ring) for t, ring in self.rings.items()}
        return {"capacity": self.capacity, "seen": dict(self.seen), "rings": rings}

    def load_state_dict(self, state: dict) -> None:
        if state["capacity"] != self.capacity:
            raise ValueError(f"the saved memory holds {state['capacity']} examples per task, expected {self.capacity}")
        self.seen, self._earlier = dict(state["seen"]), None
        self.rings = {t: Batch(*(values.clone() for values in ring)) for t, ring in state["rings"].items()}


def _room(batch: Batch, cells: int) -> Batch:
    """Cells for examples like those of the batch, zeros."""
    return Batch(*(part.new_zeros(part.shape[0], cells, *part.shape[2:]) for part in batch))


def _plain(batch: Batch | None) -> tuple | None:
    return None if batch is None else tuple(batch)
