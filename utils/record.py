"""What is left of a run: one folder for it, one in it for every seed, every file whole.

<log_dir>/<model>/<expt_name>-<time>/
    summary.json                mean and standard deviation over seeds
    accuracy_matrix.png, task_accuracy.png, alignment.png      means over seeds
    <seed>/
        training_parameters.json    options, where each comes from, versions, commit, device
        results.json                final metrics, status, seconds, peak memory
        accuracy_matrix.csv         row: after task i; column: accuracy on task j (fraction)
        evaluations.csv, alignment.csv      the same at every evaluation; see docs/records.md
        results.txt, results.pt     as the La-MAML and MER programs wrote them
        network.pt                  the network as meta-training left it, if there was any
        accuracy_matrix.png, task_accuracy.png, alignment.png, TensorBoard events
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import torch

from utils import atomic, legacy, plots, saved_network, tensors
from utils.config import Config
from utils.divergence import Fault
from utils.errors import UserError
from utils.events import EventFile
from utils.loop import Evaluation, Step
from utils.metrics import metrics
from utils.run_folder import SUMMARY, RunFolder, lasting


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    folder: its record. status: completed, diverged or interrupted (the worst of its seeds'). faults: seed -> how it
    diverged. metrics: name -> one value per seed, nan for a seed that did not complete. matrices: [seeds, phases,
    tasks] fractions, nan where a phase was not reached. exit_code: of the process.
    """

    folder: Path
    status: str
    faults: dict[int, Fault]
    metrics: dict[str, np.ndarray]
    matrices: np.ndarray
    exit_code: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the training of a run ended.

    faults: replica -> how it diverged. interrupted: the exit code of a run that was asked to stop, else 0.
    resumed_at_steps: where it went on after a stop. parameters: name -> [seeds, ...], see Learner.named_parameters,
    those of the last sound look for a replica that diverged.
    """

    faults: dict[int, Fault]
    interrupted: int
    steps: int
    resumed_at_steps: tuple[int, ...]
    train_seconds: float
    evaluation_seconds: float
    peak_memory_bytes: int
    parameters: dict[str, torch.Tensor]

    def status(self, replica: int) -> str:
        return "diverged" if replica in self.faults else "interrupted" if self.interrupted else "completed"

    @property
    def exit_code(self) -> int:
        return self.interrupted or (3 if self.faults else 0)


class Record:
    """Collects what the loop reports and writes it down.

    Args:
        config: the run's. folder: where.
        learned_at: [tasks], the phase in which each task is learnt. n_phases: their number.
        state: of an earlier record of the same run, to go on from.

    Every method raises UserError if the folder cannot be written any more.
    """

    def __init__(
        self, config: Config, folder: RunFolder, learned_at: np.ndarray, n_phases: int, state: dict | None = None
    ):
        self.config, self.learned_at, self.n_phases = config, learned_at, n_phases
        self.run_folder, self.folder = folder, folder.path
        self.split = config.run.evaluate_on
        self.evaluations = [Evaluation(**parts) for parts in state["evaluations"]] if state else []
        self._steps: list[Step] = []
        sizes = state["event_bytes"] if state else [0] * len(config.seeds)
        self._boards: list[EventFile] = []
        with self._writing():
            for seed, size in zip(config.seeds, sizes, strict=True):
                self._boards.append(EventFile(self._seed_folder(seed), size))
        #: Sentences that the user should read.
        self.notes = [f"{board.path} lacks events of before the stop." for board in self._boards if board.incomplete]

    def _seed_folder(self, seed: int) -> Path:
        return self.run_folder.seed_folder(seed)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the record in {self.folder} cannot be written ({error}): make room, then go on with"
                f" --resume {self.folder}."
            ) from None

    def add(self, event: Step | Evaluation) -> None:
        """Notes a step, or an evaluation."""
        if isinstance(event, Step):
            self._steps.append(event)
            return
        self.evaluations.append(event)
        with self._writing():
            self._write_losses()
            self._write_events(event)

    def state_dict(self) -> dict:
        """All that another record of the same run needs to go on; everything noted so far is on the disk."""
        with self._writing():
            self._write_losses()
            sizes = [board.sync() for board in self._boards]
        return {"evaluations": [vars(evaluation) for evaluation in self.evaluations], "event_bytes": sizes}

    def release(self) -> None:
        """Closes what is open, whatever state it is in."""
        for board in self._boards:
            with contextlib.suppress(OSError):
                board.close()

    def _write_losses(self) -> None:
        """TensorBoard: the losses since the last time; in one go, because each look at a loss waits for the device."""
        losses = torch.stack([step.loss for step in self._steps]).cpu() if self._steps else []
        for replica, board in enumerate(self._boards):
            for step, loss in zip(self._steps, losses, strict=True):
                if loss[replica].isfinite():
                    board.scalar("loss" if step.phase >= 0 else "pretraining_loss", loss[replica], step.step)
        self._steps = []

    def _write_events(self, evaluation: Evaluation) -> None:
        learnt = torch.from_numpy(self.learned_at <= evaluation.phase)
        for replica, board in enumerate(self._boards):
            for split, accuracy in evaluation.accuracy.items():
                for t, value in enumerate(accuracy[replica]):
                    if value.isnan():
                        continue
                    board.scalar(f"accuracy_{split}/task_{t:02d}", value, evaluation.step)
                mean = accuracy[replica][learnt].mean()
                if not mean.isnan():
                    board.scalar(f"accuracy_{split}/mean_of_learnt_tasks", mean, evaluation.step)
            for name, values in evaluation.statistics.items():
                board.scalar(name if "/" in name else f"alignment/{name}", values[replica], evaluation.step)
            board.flush()

    def save_networks(self, weights: dict[str, torch.Tensor], diverged) -> None:
        """Writes network.pt for every seed but those of diverged replicas. weights: name -> [seeds, ...]."""
        options = self.run_folder.parameters["options"]
        with self._writing():
            for replica, seed in enumerate(self.config.seeds):
                if replica in diverged:
                    continue
                mine = {name: values[replica] for name, values in weights.items()}
                saved_network.save(self._seed_folder(seed), self.config.algorithm.name, options, mine)

    def close(self, outcome: Outcome) -> Result:
        """Writes every file that is left to write, the summary last."""
        with self._writing():
            return self._close(outcome)

    def _close(self, outcome: Outcome) -> Result:
        self._write_losses()
        for board in self._boards:
            board.sync()
            board.close()
        per_seed = [self._write_seed(replica, seed, outcome) for replica, seed in enumerate(self.config.seeds)]
        names = list(dict.fromkeys(name for values in per_seed for name in values))
        by_metric = {name: np.array([values.get(name, np.nan) for values in per_seed]) for name in names}
        statuses = [outcome.status(replica) for replica in range(len(self.config.seeds))]
        status = "interrupted" if outcome.interrupted else "diverged" if outcome.faults else "completed"
        matrices = np.stack([self.matrix(replica, self.split) for replica in range(len(self.config.seeds))])
        if completed := [replica for replica, found in enumerate(statuses) if found == "completed"]:
            curves, statistics = self._curves(self.split), self._statistics(lambda values: values[completed].mean())
            self._draw(self.folder, matrices[completed].mean(axis=0), curves[completed].mean(axis=0), statistics)
        self._write_summary(status, statuses, by_metric, outcome)
        faults = {self.config.seeds[replica]: fault for replica, fault in outcome.faults.items()}
        return Result(self.folder, status, faults, by_metric, matrices, outcome.exit_code)

    # ------------------------------------------------------------ what was measured

    def _evaluations_of(self, split: str) -> list[Evaluation]:
        return [e for e in self.evaluations if split in e.accuracy]

    def matrix(self, replica: int, split: str) -> np.ndarray:
        """[phases, tasks] fractions, nan where a phase was not reached or a task not evaluated."""
        matrix = np.full((self.n_phases, len(self.learned_at)), np.nan)
        for e in self._evaluations_of(split):
            if e.ends_phase and e.phase >= 0:
                matrix[e.phase] = e.accuracy[split][replica].numpy()
        return matrix

    def _curves(self, split: str) -> np.ndarray:
        """[seeds, evaluations, tasks] fractions."""
        return torch.stack([e.accuracy[split] for e in self._evaluations_of(split)], dim=1).numpy()

    def _statistics(self, of_seeds) -> dict[str, list[float]]:
        """Name -> of_seeds([seeds]) at each evaluation."""
        names = self.evaluations[0].statistics
        return {name: [float(of_seeds(e.statistics[name])) for e in self.evaluations] for name in names}

    # ------------------------------------------------------------ what is written

    def _write_seed(self, replica: int, seed: int, outcome: Outcome) -> dict[str, float]:
        """One seed's files. Returns its metrics, empty unless it completed."""
        folder, status = self._seed_folder(seed), outcome.status(replica)
        found: dict[str, float] = {}
        statistics = self._statistics(lambda values: values[replica])
        for split in self.evaluations[0].accuracy:
            matrix, curve = self.matrix(replica, split), self._curves(split)[replica]
            suffix = split.removeprefix(self.split) if split.startswith(self.split) else f"_{split}"
            atomic.write_text(folder / f"accuracy_matrix{suffix}.csv", _matrix_csv(matrix))
            atomic.write_text(folder / f"evaluations{suffix}.csv", self._evaluations_csv(split, curve))
            if status == "completed":
                found |= {name + suffix: value for name, value in metrics(matrix, curve[0], self.learned_at).items()}
            if split == self.split:
                self._write_legacy(folder, replica, matrix, curve, outcome)
                if not outcome.interrupted:  # drawn when it ends; a run that is told to stop must be quick
                    self._draw(folder, matrix, curve, statistics)
        if statistics:
            atomic.write_text(folder / "alignment.csv", self._statistics_csv(statistics))
        kept = {**found, "status": status}
        if status == "diverged":
            fault = outcome.faults[replica]
            kept |= {"diverged_at_step": fault.step, "diverged": dataclasses.asdict(fault)}
        atomic.write_text(
            folder / "results.json", _json({**kept, **_costs(outcome), "evaluated_on": self.split, "units": UNITS})
        )
        return found

    def _write_legacy(self, folder: Path, replica: int, matrix, curve, outcome: Outcome) -> None:
        labels = [max(e.phase, 0) for e in self._evaluations_of(self.split)]
        weights = {name: values[replica].cpu().clone() for name, values in outcome.parameters.items()}
        parameters = self.run_folder.parameters
        options = {name: parameters[name] for name in ("model", "dataset")}
        options |= lasting(parameters["options"])
        options["seed"] = self.config.seeds[replica]
        with np.errstate(all="ignore"):
            atomic.write_text(folder / "results.txt", legacy.results_txt(matrix, curve[0], self.learned_at))
            content = legacy.results_pt(labels, curve, weights, matrix, curve[0], self.learned_at, options)
        tensors.save(folder / "results.pt", content)

    def _write_summary(self, status: str, statuses: list[str], by_metric: dict, outcome: Outcome) -> None:
        summary = {
            "model": self.config.algorithm.name,
            "dataset": self.config.dataset.name,
            "as_published": self.config.as_published,
            "identity": self.config.identity(),
            "status": status,
            "status_of_seeds": dict(zip(map(str, self.config.seeds), statuses, strict=True)),
            "metrics": {name: spread(values) for name, values in by_metric.items()},
            **_costs(outcome),
            "evaluated_on": self.split,
            "units": UNITS,
        }
        atomic.write_text(self.folder / SUMMARY, _json(summary))

    def _draw(self, folder: Path, matrix, curve, statistics: dict) -> None:
        steps = [e.step for e in self._evaluations_of(self.split)]
        title = f"{self.config.algorithm.name} on {self.config.dataset.name}, seed {folder.name}"
        if folder == self.folder:
            title = f"{self.config.algorithm.name} on {self.config.dataset.name}, mean over seeds"
        plots.save(folder / "accuracy_matrix.png", plots.accuracy_matrix(matrix, title))
        plots.save(folder / "task_accuracy.png", plots.task_accuracy(steps, curve, title))
        if statistics:
            plots.save(folder / "alignment.png", plots.alignment([e.step for e in self.evaluations], statistics, title))

    def _evaluations_csv(self, split: str, curve: np.ndarray) -> str:
        header = ["step", "phase", *(f"task_{t}" for t in range(curve.shape[1]))]
        rows = [[e.step, e.phase, *_rounded(row)] for e, row in zip(self._evaluations_of(split), curve, strict=True)]
        return _csv([header, *rows])

    def _statistics_csv(self, statistics: dict[str, list[float]]) -> str:
        rows = [
            [e.step, e.phase, *values]
            for e, values in zip(self.evaluations, zip(*statistics.values(), strict=True), strict=True)
        ]
        return _csv([["step", "phase", *statistics], *rows])


UNITS = {
    "accuracies, metrics": "fraction",
    "seconds": "s, all seeds together",
    "peak_memory_bytes": "byte, all seeds together",
}


def spread(values: np.ndarray) -> dict:
    """Mean and sample standard deviation (divisor n - 1) over the seeds that completed, and all values in order."""
    known = values[~np.isnan(values)]
    return {
        "mean": float(known.mean()) if len(known) else None,
        "std": float(known.std(ddof=1)) if len(known) > 1 else None,
        "values": values.tolist(),
    }


def _costs(outcome: Outcome) -> dict:
    names = ("steps", "resumed_at_steps", "train_seconds", "evaluation_seconds", "peak_memory_bytes")
    return {name: getattr(outcome, name) for name in names}


def _json(content: dict) -> str:
    return json.dumps(_without_nan(content), indent=2) + "\n"


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rounded(values) -> list[str]:
    return [f"{value:.6f}" for value in values]


def _matrix_csv(matrix: np.ndarray) -> str:
    header = ["after_phase", *(f"task_{t}" for t in range(matrix.shape[1]))]
    return _csv([header, *([i, *_rounded(row)] for i, row in enumerate(matrix))])


def _csv(rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
