"""The interface that every algorithm implements and that everything else relies on."""

import abc
import copy

import torch
from torch import Tensor

from model.alignment import GradientAlignment
from utils.random_streams import RandomStreams


class Learner(abc.ABC):
    """Learns a stream of tasks, one batch at a time, in several replicas at once (one per seed).

    A new algorithm subclasses this, implements `observe`, and lists in `state` the attributes that change while it
    learns; see model/README.md.

    Args:
        network: see model/networks/.
        options: an instance of the options dataclass that the registry names for the algorithm.
        seeds: one per replica.
        device, dtype: where and in what precision the weights live.
    """

    #: Names of the attributes that make up the learning state: tensors, plain values, or objects with a state_dict.
    state: tuple[str, ...] = ("weights", "random", "epoch")

    #: Steps of pre-training, before the stream begins; see `pretrain`.
    pretraining_steps = 0

    #: The source of replayed examples that `watch_alignment` compares with; False for learners that replay nothing.
    replays = False

    def __init__(self, network, options, seeds, device="cpu", dtype=torch.float32):
        self.network, self.options, self.seeds = network, options, tuple(seeds)
        self.heads = network.heads
        self.random = RandomStreams(seeds)
        self.weights: Tensor = network.initial_weights(RandomStreams(seeds)["initial weights"], dtype).to(device)
        self.epoch = 0
        self.alignment: GradientAlignment | None = None

    @abc.abstractmethod
    def observe(self, x: Tensor, t, y: Tensor) -> Tensor:
        """Learns from one batch.

        Args:
            x: [replicas, batch, *input shape], float.
            t: the task, int; or [replicas, batch] int64 where a batch mixes tasks.
            y: [replicas, batch], int64 classes.

        Returns: the loss of each replica on what it just learnt from, [replicas].
        """

    def pretrain(self, stream, step: int) -> Tensor:
        """One step of pre-training, the first being number 0; called `pretraining_steps` times before the stream.

        Everything drawn or changed in it must be part of `state`: a run may stop and go on between two steps.

        Returns: the loss of each replica, [replicas].
        """
        raise NotImplementedError(f"{type(self).__name__} names pretraining_steps, so it must implement pretrain")

    def predict(self, x: Tensor, t: int | None = None) -> Tensor:
        """Logits [replicas, batch, classes]. t: the task if it is known; None: all classes seen so far compete."""
        return self.network.to_predict(self.scores(x), t)

    def scores(self, x: Tensor) -> Tensor:
        """How well each class fits, [replicas, batch, classes], whatever the task. Changes nothing."""
        with torch.no_grad():
            return self.network(self.weights, x)

    def see_task(self, t: int) -> None:
        """Called before `begin_task`: the classes of task t, and of all before it, are known from now on."""
        if self.heads is not None:
            self.heads.begin(t)

    def begin_task(self, t: int) -> None:
        """Called before the first batch of task t."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before every pass over a task's data; epoch counts from 0 in each task."""
        self.epoch = epoch

    def end_task(self, t: int) -> None:
        """Called after the last batch of task t."""

    def watch_alignment(self) -> None:
        """From now on measures how gradients of new and replayed examples agree; see model/alignment.py."""
        self.alignment = GradientAlignment(len(self.seeds))

    def statistics(self) -> dict[str, Tensor]:
        """Figures about the learner itself, name -> [replicas], for the record."""
        return self.alignment.means() if self.alignment else {}

    def named_parameters(self) -> dict[str, Tensor]:
        """What has been learnt, name -> [replicas, *shape], for people and other programs."""
        return self.network.layout.named(self.weights)

    def state_dict(self, copied: bool = True) -> dict:
        """Everything that learning has changed, random streams included; loads with torch.load(weights_only=True).

        copied: learning on does not change it; not needed to write it at once.
        """
        return {name: _saved(getattr(self, name), copied) for name in self._kept}

    @property
    def _kept(self) -> tuple[str, ...]:
        extra = [name for name in ("alignment", "heads") if getattr(self, name) is not None]
        return (*self.state, *extra)

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state`, saved by a learner built alike; ValueError if it does not fit."""
        if set(state) != set(self._kept):
            raise ValueError(f"the saved state has {sorted(state)}, {type(self).__name__} keeps {sorted(self._kept)}")
        for name, value in state.items():
            current = getattr(self, name)
            if hasattr(current, "load_state_dict"):
                current.load_state_dict(_moved(value, self.weights.device))
            elif isinstance(current, Tensor):
                if current.shape != value.shape:
                    raise ValueError(f"the saved {name} is {tuple(value.shape)}, expected {tuple(current.shape)}")
                setattr(self, name, value.to(current, copy=True))
            else:
                setattr(self, name, value)


def the_task(t) -> int:
    """t, for learners to whom tasks come one at a time and known; ValueError for mixed or unknown ones."""
    if not isinstance(t, int):
        raise ValueError(f"the task must be known and the same for the whole batch, not {t!r:.40}")
    return t


def _moved(value, device):
    """The same nested dicts, lists and tuples with their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return type(value)(_moved(part, device) for part in value) if isinstance(value, list | tuple) else value


def _saved(value, copied: bool):
    if hasattr(value, "state_dict"):
        return copy.deepcopy(value.state_dict()) if copied else value.state_dict()
    return value.detach().clone() if isinstance(value, Tensor) and copied else value
