#!/usr/bin/env python3
"""Milliseconds per observed batch of every algorithm on CIFAR-100's network, beside the 2020 code.

    uv run python -m benchmarks.images [--device cuda] [--threads 1] [--models er lamaml] [--replicas 1 3] [--out FILE]

Each algorithm runs with its default settings for cifar100 (papers/: the published single pass) on random images, in the
third task, with its memory full; iCaRL in the first, too: the 2020 code's figure is of that, as on a CPU it gets no
further. Figures are medians, per observed batch (10 images; one for MER) and replica;
matmul_gflops is the speed that the machine had after each row. The 2020 code's figures are of one core of a machine
like the one that results/images_cpu.json names, and of one replica, in an hour of unknown speed.
"""

import dataclasses
import statistics
import time

import numpy as np
import torch

from benchmarks.common import OnDevice, machine, matmul_gflops, options, write
from model.batch import Batch
from model.memory import Reservoir
from model.networks import Heads, build_network
from model.registry import ALGORITHMS
from utils.command_line import one_sentence
from utils.config import configure
from utils.errors import UserError, nearest
from utils.options import Option, option

SHAPE, CLASSES, PER_TASK, TASK = (3, 32, 32), 100, 5, 2

#: Milliseconds per observed batch of the 2020 code; MER: per sample.
PUBLISHED = {"lamaml": 4770, "mer": 1730, "gem": 790, "agem": 600, "la_er": 324, "er": 288, "icarl, first task": 72}


@dataclasses.dataclass(frozen=True)
class Options(OnDevice):
    models: tuple[str, ...] = option(tuple(a for a in ALGORITHMS if a != "taskinput"), "algorithms to measure")
    replicas: tuple[str, ...] = option(("1", "3", "5"), "numbers of replicas")
    seconds: float = option(20.0, "spent on each figure, at least", above=0, high=3600)


def milliseconds(name: str, task: int, replicas: int, o: Options) -> float:
    """Per observed batch and replica, in a task that is counted from 0."""
    config = configure(["--model", name, "--dataset", "cifar100"])
    network = build_network(config.network, SHAPE, CLASSES, Heads(CLASSES, PER_TASK, "task"))
    network = config.algorithm.network(network, TASK + 1, config.learner)
    learner = config.algorithm.learner(network, config.learner, range(replicas), device=o.device)
    rng = np.random.default_rng(0)

    def batch(t: int, n: int = config.run.batch_size):
        x = torch.from_numpy(rng.standard_normal((replicas, n, *SHAPE), dtype=np.float32))
        y = torch.from_numpy(rng.integers(PER_TASK * t, PER_TASK * (t + 1), (replicas, n)))
        return x.to(o.device), t, y.to(o.device)

    def timed() -> float:
        x, t, y = batch(task)
        if o.device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        learner.observe(x, t, y)
        if o.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for t in range(task):
        learner.see_task(t)
        learner.begin_task(t)
        if isinstance(memory := getattr(learner, "memory", None), Reservoir):
            x, _, y = batch(t, memory.capacity // task)
            memory.add(Batch.of(x, y, t))
        else:
            learner.observe(*batch(t))
        learner.end_task(t)
    learner.see_task(task)
    learner.begin_task(task)
    timed()
    found, began = [], time.perf_counter()
    while len(found) < 3 or time.perf_counter() - began < o.seconds:
        found.append(timed())
    return 1000 * statistics.median(found) / replicas


def places(models) -> list[tuple[str, str, int]]:
    """The name of each row, its algorithm and task."""
    return [(name, name, TASK) for name in models] + [("icarl, first task", "icarl", 0)] * ("icarl" in models)


def main():
    o = options(Options, __doc__)
    if unknown := [name for name in o.models if name not in ALGORITHMS or name == "taskinput"]:
        raise UserError(f"--models {unknown[0]} is not known here: {nearest(unknown[0], ALGORITHMS)}.")
    counts = [Option("replicas", int, 1, low=1, high=1000).parse(text) for text in o.replicas]
    torch.manual_seed(0)
    rows = []
    for name, model, task in places(o.models):
        found = {str(n): round(milliseconds(model, task, n, o), 1) for n in counts}
        row = {"model": name, "ms_per_replica": found, "published_ms": PUBLISHED.get(name)}
        row["matmul_gflops"] = round(matmul_gflops(o.device))
        faster = {n: round(PUBLISHED[name] / ms, 2) for n, ms in found.items()} if name in PUBLISHED else {}
        row["times_faster"] = faster
        rows.append(row)
        times = ", ".join(f"{n} replicas {ms:9.1f} ms" for n, ms in found.items())
        print(f"{name:17} {times}; times faster: {', '.join(map(str, faster.values())) or '-'}", flush=True)
    write(o.out, {**machine(o), "unit": "ms per observed batch and replica", "rows": rows})


if __name__ == "__main__":
    with one_sentence("benchmarks.images"):
        main()
