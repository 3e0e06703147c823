"""The continual loop: drives a learner through a stream and reports; keeps no records, asks no algorithm's name."""

import dataclasses
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dataloaders.stream import Stream, TrainingSet
from model.learner import Learner
from utils.evaluation import evaluate

#: Batches between looks at the losses for replicas that diverged (a look waits for the device).
LOOK_EVERY = 50


@dataclasses.dataclass(frozen=True)
class Step:
    """One observed batch. phase: position in the stream; step: batches observed so far; loss: [replicas]."""

    phase: int
    step: int
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is known after `step` batches.

    phase: the phase just learnt from, -1 before any training. ends_phase: whether it is complete.
    accuracy: split -> [replicas, tasks] fractions, nan where a task was not evaluated. statistics: name -> [replicas],
    see Learner.statistics. seconds: what it took.
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
        evaluate_tasks: see RunOptions; for phases of several tasks, "task" there is phase.

    Iterating yields a Step after every batch and an Evaluation before the first, at the end of each phase, and after
    every `log_every` batches of a phase. Attributes hold what happened: train_seconds, evaluation_seconds, and
    diverged_at [replicas], the step at which a replica's loss or outputs stopped being finite numbers, -1 if they did
    not. The loop ends early once every replica has diverged.
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
    ):
        self.learner, self.stream, self.phases = learner, stream, phases
        self.n_epochs, self.batch_size, self.log_every = n_epochs, batch_size, log_every
        self.splits, self.final_splits, self.evaluate_tasks = splits, final_splits, evaluate_tasks
        self.train_seconds = self.evaluation_seconds = 0.0
        self.step = 0
        self.diverged_at = torch.full((len(learner.seeds),), -1)

    @property
    def total_steps(self) -> int:
        sizes = [sum(self.stream.training_size(t) for t in tasks) for tasks in self.phases]
        return sum(self.n_epochs * -(-size // self.batch_size) for size in sizes)

    def __iter__(self) -> Iterator[Step | Evaluation]:
        yield self._evaluate(-1, True)
        for phase, tasks in enumerate(self.phases):
            yield from self._learn(phase, tasks)
            if self.all_diverged:
                return
            yield self._evaluate(phase, True)

    def _learn(self, phase: int, tasks: list[int]) -> Iterator[Step | Evaluation]:
        started = time.perf_counter()
        data = TrainingSet(self.stream, phase, tasks, self.learner.seeds)
        self.learner.begin_task(phase)
        observed = 0
        try:
            for epoch in range(self.n_epochs):
                self.learner.begin_epoch(epoch)
                for x, t, y in data.batches(epoch, self.batch_size):
                    if self.log_every and observed and observed % self.log_every == 0:
                        evaluation = self._evaluate(phase, False)
                        started += evaluation.seconds
                        yield evaluation
                    loss = self.learner.observe(x, t, y)
                    self.step, observed = self.step + 1, observed + 1
                    self._note_divergence(loss.isfinite())
                    yield Step(phase, self.step, loss)
                    if observed % LOOK_EVERY == 0 and self.all_diverged:
                        return
            self.learner.end_task(phase)
        finally:
            self._wait()
            self.train_seconds += time.perf_counter() - started

    def _evaluate(self, phase: int, ends_phase: bool) -> Evaluation:
        started = time.perf_counter()
        splits = (*self.splits, *self.final_splits) if ends_phase else self.splits
        accuracy = {}
        for split in splits:
            accuracy[split], finite = evaluate(self.learner, self.stream, split, self._wanted(phase))
            self._note_divergence(finite.to(self.diverged_at.device))
        statistics = {name: value.cpu() for name, value in self.learner.statistics().items()}
        if self.learner.alignment:
            self.learner.alignment.reset()
        seconds = time.perf_counter() - started
        self.evaluation_seconds += seconds
        return Evaluation(phase, self.step, ends_phase, accuracy, statistics, seconds)

    def _wanted(self, phase: int) -> set[int] | None:
        """The tasks to evaluate in or after a phase; None for all."""
        if self.evaluate_tasks == "all" or phase in (-1, len(self.phases) - 1):
            return None
        first = phase if self.evaluate_tasks == "new" else 0
        return {t for tasks in self.phases[first : phase + 2] for t in tasks}

    def _note_divergence(self, finite: Tensor) -> None:
        self.diverged_at = self.diverged_at.to(finite.device)
        self.diverged_at = torch.where((self.diverged_at < 0) & ~finite, self.step, self.diverged_at)

    @property
    def all_diverged(self) -> bool:
        return bool((self.diverged_at >= 0).all())

    def _wait(self) -> None:
        if self.learner.weights.is_cuda:
            torch.cuda.synchronize(self.learner.weights.device)
