"""The continual loop: drives a learner through a stream and reports; keeps no records, asks no algorithm's name."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dataloaders.stream import Stream, TrainingSet
from model.learner import Learner
from utils.divergence import Divergence
from utils.evaluation import evaluate

#: Batches between looks at the losses for replicas that diverged (a look waits for the device), and at the parameters.
EXAMINE_EVERY, LOOK_EVERY = 50, 250


#: Where the evaluation before the stream is; it is made even if pre-training has diverged, so that there is a record.
START = (-1, True)

#: Ends the names of accuracies measured without telling the task.
AGNOSTIC = "_task_agnostic"


@dataclasses.dataclass(frozen=True)
class Step:
    """One observed batch. phase: position in the stream; step: batches observed so far; loss: [replicas].

    In pre-training phase is -1, and step counts its own steps.
    """

    phase: int
    step: int
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is known after `step` batches.

    phase: the phase just learnt from, -1 before any training. ends_phase: whether it is complete.
    accuracy: split -> [replicas, tasks] fractions, nan where a task was not evaluated or a replica has diverged.
    statistics: name -> [replicas], see Learner.statistics. seconds: what it took.
    """

    phase: int
    step: int
    ends_phase: bool
    accuracy: dict[str, Tensor]
    statistics: dict[str, Tensor]
    seconds: float


class Loop:
    """One run of a learner through a stream.

    Args:
        learner, stream: whom and on what.
        phases: the tasks of each phase; one task each, or all in one for a learner of mixed tasks.
        n_epochs, batch_size, log_every: see RunOptions.
        splits: what is evaluated at each evaluation; the first is the one that the metrics are of.
        final_splits: what is evaluated at the ends of phases only.
        evaluate_tasks, evaluate_after: see RunOptions; for phases of several tasks, "task" there is phase.
        task_agnostic: also evaluate without telling the task; accuracies named <split>_task_agnostic.

    Iterating yields a Step after every batch and an Evaluation before the first, at the end of each phase, and after
    every `log_every` batches of a phase. Attributes hold what happened: step, train_seconds, evaluation_seconds, and
    divergence. The loop ends early once every replica is seen to have diverged, when it looks for that.

    A run is a plan of actions, the same whenever it is made, so that its position is one number: how many are done.
    Between two events, `state_dict` (with the learner's) is all that another loop needs to go on from there, with the
    same events as if nothing had happened.
    """

    def __init__(
        self,
        learner: Learner,
        stream: Stream,
        phases,
        n_epochs,
        batch_size,
        log_every,
        splits,
        final_splits=(),
        evaluate_tasks="all",
        evaluate_after=(),
        task_agnostic=False,
    ):
        self.learner, self.stream, self.phases = learner, stream, phases
        self.n_epochs, self.batch_size, self.log_every = n_epochs, batch_size, log_every
        self.splits, self.final_splits, self.evaluate_tasks = splits, final_splits, evaluate_tasks
        self.evaluate_after = set(evaluate_after)
        self.task_agnostic = task_agnostic
        self.divergence = Divergence(len(learner.seeds))
        self.done = self.step = 0
        self.train_seconds = self.evaluation_seconds = 0.0
        #: Whether everything is done; whether it is because every replica was seen to have diverged.
        self.ended = self.over = False
        #: Whether an evaluation is going on: giving it up then loses nothing.
        self.evaluating = False
        self._lap_began: float | None = None
        self._data: TrainingSet | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, pre-training included."""
        return self.learner.pretraining_steps + sum(self.n_epochs * self._n_batches(tasks) for tasks in self.phases)

    @property
    def steps_done(self) -> int:
        """Of `total_steps`."""
        return self.step + min(self.done, self.learner.pretraining_steps)

    def _n_batches(self, tasks: list[int]) -> int:
        return -(-sum(self.stream.training_size(t) for t in tasks) // self.batch_size)

    def __iter__(self) -> Iterator[Step | Evaluation]:
        self._lap_began = time.perf_counter()
        for act, where in itertools.islice(self._plan(), self.done, None):
            if self.over and act == self._pretrain:
                continue
            if self.over and where != START:
                break
            event = act(*where)
            self.done += 1
            if isinstance(event, Step | Evaluation):
                yield event
        self._end_lap()
        self.ended = True

    def _plan(self) -> Iterator[tuple[Callable, tuple]]:
        """All that the run does, in order: an action and its arguments."""
        for step in range(self.learner.pretraining_steps):
            yield self._pretrain, (step,)
        yield self._evaluate, START
        for phase, tasks in enumerate(self.phases):
            n_batches = self._n_batches(tasks)
            yield self._begin_task, (phase,)
            for epoch in range(self.n_epochs):
                yield self.learner.begin_epoch, (epoch,)
                for batch in range(n_batches):
                    observed = epoch * n_batches + batch
                    if self.log_every and observed and observed % self.log_every == 0:
                        yield self._evaluate, (phase, False)
                    yield self._observe, (phase, epoch, batch, observed + 1)
            yield self._end_task, (phase,)
            yield self._evaluate, (phase, True)

    def _pretrain(self, step: int) -> Step:
        loss = self.learner.pretrain(self.stream, step)
        self.divergence.note(0, -1, loss)
        if (step + 1) % LOOK_EVERY == 0:
            self._look(-1)
        return Step(-1, step + 1, loss)

    def _observe(self, phase: int, epoch: int, batch: int, number: int) -> Step:
        if self._data is None:
            self._data = TrainingSet(self.stream, phase, self.phases[phase], self.learner.seeds, self.batch_size)
        loss = self.learner.observe(*self._data.batch(epoch, batch))
        self.step += 1
        self.divergence.note(self.step, phase, loss)
        if number % EXAMINE_EVERY == 0:
            self._look(phase, number % LOOK_EVERY == 0)
        return Step(phase, self.step, loss)

    def _begin_task(self, phase: int) -> None:
        self.learner.see_task(max(self.phases[phase]))
        self.learner.begin_task(phase)

    def _end_task(self, phase: int) -> None:
        self.learner.end_task(phase)
        self._data = None
        self._look(phase)

    def _look(self, phase: int, at_parameters: bool = True) -> None:
        if at_parameters:
            self.divergence.look(self.step, phase, self.learner.named_parameters())
        else:
            self.divergence.examine()
        self.over = self.divergence.all

    def _evaluate(self, phase: int, ends_phase: bool) -> Evaluation:
        self._end_lap()
        began = time.perf_counter()
        with self._evaluation():
            self.divergence.look(self.step, phase, self.learner.named_parameters())
            splits = (*self.splits, *self.final_splits) if ends_phase else self.splits
            accuracy = {}
            for split in splits:
                accuracy[split], finite, agnostic = evaluate(
                    self.learner, self.stream, split, self._wanted(phase), self.task_agnostic
                )
                if agnostic is not None:
                    accuracy[split + AGNOSTIC] = agnostic
                self.divergence.note_outputs(self.step, phase, finite)
            for values in accuracy.values():
                values[list(self.divergence.faults)] = torch.nan
            statistics = {name: value.cpu() for name, value in self.learner.statistics().items()}
        if self.learner.alignment:
            self.learner.alignment.reset()
        self.over = self.divergence.all
        self._lap_began = time.perf_counter()
        seconds = self._lap_began - began
        self.evaluation_seconds += seconds
        return Evaluation(phase, self.step, ends_phase, accuracy, statistics, seconds)

    @contextlib.contextmanager
    def _evaluation(self):
        self.evaluating = True
        try:
            yield
        finally:
            self.evaluating = False

    def _wanted(self, phase: int) -> set[int] | None:
        """The tasks to evaluate in or after a phase; None for all."""
        if self.evaluate_tasks == "all" or phase in (-1, len(self.phases) - 1):
            return None
        first = phase if self.evaluate_tasks == "new" and phase + 1 not in self.evaluate_after else 0
        return {t for tasks in self.phases[first : phase + 2] for t in tasks}

    def _end_lap(self) -> None:
        """Counts the time since the lap began, all work on the device done, as training; no lap is on afterwards."""
        if self._lap_began is None:
            return
        if self.learner.weights.is_cuda:
            torch.cuda.synchronize(self.learner.weights.device)
        self.train_seconds += time.perf_counter() - self._lap_began
        self._lap_began = None

    @contextlib.contextmanager
    def pause(self):
        """What is done within the block does not count as training."""
        self._end_lap()
        yield
        self._lap_began = time.perf_counter()

    def state_dict(self) -> dict:
        """The position, and what the learner does not know."""
        self._end_lap()
        return {
            "done": self.done,
            "step": self.step,
            "over": self.over,
            "divergence": self.divergence.state_dict(),
            "train_seconds": self.train_seconds,
            "evaluation_seconds": self.evaluation_seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there when iterated."""
        self.divergence.load_state_dict(state["divergence"])
        for name in ("done", "step", "over", "train_seconds", "evaluation_seconds"):
            setattr(self, name, state[name])
