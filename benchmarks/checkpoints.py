#!/usr/bin/env python3
"""What trust costs: seconds and bytes of a checkpoint, and the time of watching for divergence and of --deterministic.

    uv run python -m benchmarks.checkpoints [--device cuda] [--threads 1] [--models lamaml mer] [--out FILE]

Each algorithm with its default settings for mnist_rotations and five replicas, in the middle of the stream (see
benchmarks/observe.py). A checkpoint is the learner's state, written with its digest and waited for on the disk; loading
verifies the digest. "of a batch" is in units of the time of one observed batch. "watching" is the share of the training
time that looking for replicas that diverged takes: at the losses every 50 batches, at all parameters every 250.
"deterministic to plain" is the ratio of the times per batch with and without --deterministic. All are medians of
alternating repetitions, since a machine's speed drifts.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import OnDevice, machine, options, write
from benchmarks.observe import learner_of
from model.registry import ALGORITHMS
from utils.checkpoint import Checkpoints
from utils.command_line import one_sentence
from utils.divergence import Divergence
from utils.errors import UserError, nearest
from utils.loop import EXAMINE_EVERY, LOOK_EVERY
from utils.options import option

REPLICAS = 5


@dataclasses.dataclass(frozen=True)
class Options(OnDevice):
    models: tuple[str, ...] = option(("online", "lamaml", "gem", "mer", "icarl"), "algorithms to measure")
    repetitions: int = option(7, "of every figure", low=1, high=1000)


def timed(act, device: str) -> float:
    """Seconds."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    act()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def row(name: str, o: Options) -> dict:
    observe, _, learner = learner_of(name, REPLICAS, o.device)

    def batches():
        for i in range(EXAMINE_EVERY):
            observe(i)

    divergence, loss = Divergence(REPLICAS), observe(0)

    def examine():
        for i in range(EXAMINE_EVERY):
            divergence.note(i, 0, loss)
        divergence.examine()

    def look():
        divergence.look(0, 0, learner.named_parameters())

    def deterministic():
        torch.use_deterministic_algorithms(True)
        batches()
        torch.use_deterministic_algorithms(False)

    batches(), deterministic()
    plain, examined, looked, strict, saved, loaded = [], [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for i in range(o.repetitions):
            plain.append(timed(batches, o.device))
            examined.append(timed(examine, o.device))
            looked.append(timed(look, o.device))
            strict.append(timed(deterministic, o.device))
            saved.append(timed(lambda i=i: checkpoints.save(i, {"learner": learner.state_dict()}), o.device))
            loaded.append(timed(lambda: learner.load_state_dict(checkpoints.load()[0]["learner"]), o.device))
        size = checkpoints.paths()[0].stat().st_size
    batch = statistics.median(plain) / EXAMINE_EVERY
    watching = statistics.median(examined) / EXAMINE_EVERY + statistics.median(looked) / LOOK_EVERY
    return {
        "model": name,
        "replicas": REPLICAS,
        "megabytes": round(size / 1e6, 1),
        "ms_to_save": round(1000 * statistics.median(saved), 1),
        "ms_to_load": round(1000 * statistics.median(loaded), 1),
        "save_of_a_batch": round(statistics.median(saved) / batch, 1),
        "watching": round(watching / batch, 4),
        "deterministic_to_plain": round(statistics.median(a / b for a, b in zip(strict, plain, strict=True)), 3),
    }


def main():
    o = options(Options, __doc__)
    if unknown := [name for name in o.models if name not in ALGORITHMS]:
        raise UserError(f"--models {unknown[0]} is not known: {nearest(unknown[0], ALGORITHMS)}.")
    torch.manual_seed(0)
    rows = [row(name, o) for name in o.models]
    for found in rows:
        print("  ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    write(o.out, {**machine(o), "rows": rows})


if __name__ == "__main__":
    with one_sentence("benchmarks.checkpoints"):
        main()
