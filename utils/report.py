"""The table that is printed at the end of a run."""

import numpy as np

from utils.config import Config
from utils.divergence import Fault
from utils.record import Result

LINES = (
    ("retained accuracy", "retained_accuracy", ".4f"),
    ("  the task not told", "retained_accuracy_task_agnostic", ".4f"),
    ("learning accuracy", "learning_accuracy", ".4f"),
    ("backward transfer and interference", "backward_transfer_and_interference", "+.4f"),
)


def report(config: Config, result: Result) -> str:
    """Metrics as mean ± standard deviation over seeds, the mean accuracy matrix, and where the records are."""
    completed = ~np.isnan(result.metrics.get("retained_accuracy", np.full(len(config.seeds), np.nan)))
    seeds = f"{len(config.seeds)} seeds" if len(config.seeds) > 1 else f"seed {config.seeds[0]}"
    if not completed.all():
        seeds = f"{completed.sum()} of {seeds}" if len(config.seeds) > 1 else f"{seeds} ({result.status})"
    mode = ", as published" if config.as_published else ""
    data = f"{config.run.evaluate_on} data"
    lines = [f"{config.algorithm.name} on {config.dataset.name}{mode}, {seeds}, evaluated on {data}", ""]
    for label, name, form in LINES:
        if name.endswith("agnostic") and name not in result.metrics:
            continue
        values = result.metrics.get(name, np.array([]))
        values = values[~np.isnan(values)]
        spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
        lines.append(f"  {label:36}" + (f"{values.mean():{form}}{spread}" if len(values) else "-"))
    if result.matrices.shape[2] > 20:
        lines += ["", "  accuracy matrix: accuracy_matrix.png and, for each seed, accuracy_matrix.csv in the record"]
    elif completed.any():
        lines += ["", *_matrix(result.matrices[completed].mean(axis=0))]
    for seed, fault in result.faults.items():
        lines += ["", _fault(seed, fault)]
    if result.status == "interrupted":
        lines += ["", f"  interrupted: go on with  main.py --resume {result.folder}"]
    return "\n".join([*lines, "", f"  records in {result.folder}"])


def _fault(seed: int, fault: Fault) -> str:
    what = fault.what if fault.what in ("loss", "outputs") else f"parameter {fault.what}"
    before = "" if fault.last_loss is None else f" (loss {fault.last_loss:.4g} at step {fault.last_loss_step})"
    where = f"step {fault.step}" if fault.phase >= 0 else "the start"
    return f"  seed {seed} diverged at {where}: its {what} was no longer finite{before}. Lower the rates."


def _matrix(mean: np.ndarray) -> list[str]:
    header = "       " + "".join(f"{j:4d}" for j in range(mean.shape[1]))
    rows = [f"  {i:4d} " + "".join(_percent(value) for value in row) for i, row in enumerate(mean)]
    return ["  accuracy (%) after learning task (row) on task (column), mean over seeds", header, *rows]


def _percent(value: float) -> str:
    return "   ." if np.isnan(value) else f"{100 * value:4.0f}"
