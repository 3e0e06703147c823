#!/usr/bin/env python3
"""Milliseconds per observed example of every algorithm, in one run on one machine.

    uv run python -m benchmarks.observe [--device cuda] [--threads 1] [--models mer gem] [--out FILE]

Each algorithm runs with its default settings for mnist_rotations (papers/; see --show_config), on random images of that
size, in the middle of the stream: memories are full, half of the tasks have been seen. Figures are the median over
repetitions, per example and replica, for 1 and for 5 replicas; "x online" is the ratio to `online` with one replica,
which takes examples one by one; others take the batches that are printed.
"""

import dataclasses
import statistics
import time

import numpy as np
import torch

from benchmarks.common import OnDevice, machine, options, write
from model.batch import Batch
from model.memory import Reservoir
from model.networks import MLP, build_network
from model.registry import ALGORITHMS
from utils import experiments, papers
from utils.command_line import one_sentence
from utils.config import configure
from utils.errors import UserError, nearest
from utils.options import option


class OneByOne(MLP):
    """The network without the shortcut for chains of single-example steps (MER)."""

    sgd_chain_ = property()


class WithGradients(MLP):
    """The network without the shortcut for inner products of gradients (GEM)."""

    group_products = property()


#: Further rows: label -> a row of papers/, and the network.
VARIANTS = {
    "mer, memory 5120": ("mer-mnist_rotations-memory5120", MLP),
    "  steps one by one": ("mer-mnist_rotations-memory5120", OneByOne),
    "gem, 100 tasks": ("gem-mnist_manypermutations", MLP),
    "  with gradients": ("gem-mnist_manypermutations", WithGradients),
}


def arguments(label: str) -> list[str]:
    """The arguments of main.py for an algorithm or one of VARIANTS."""
    if label not in VARIANTS:
        return ["--model", label, "--dataset", "mnist_rotations"]
    return experiments.arguments(next(row for row in papers.rows() if row.name == VARIANTS[label][0]), [])


def learner_of(label: str, replicas: int, device: str):
    """A function that observes one more batch, in the middle of a stream; the examples of a batch; the learner."""
    config = configure(arguments(label))
    tasks = config.stream.n_tasks // 2
    network = build_network(config.network, (784,), 10)
    network.__class__ = VARIANTS.get(label, (None, MLP))[1]
    network = config.algorithm.network(network, tasks + 1, config.learner)
    learner = config.algorithm.learner(network, config.learner, range(replicas), device=device)
    rng = np.random.default_rng(0)
    size, o = config.run.batch_size, config.learner

    def batch(n=size):
        x = torch.from_numpy(rng.random((replicas, n, 784), dtype=np.float32)).to(device)
        return x, torch.from_numpy(rng.integers(0, 10, (replicas, n))).to(device)

    for t in range(tasks):
        learner.begin_task(t)
        memory = getattr(learner, "memory", None)
        if isinstance(memory, Reservoir):
            x, y = batch(-(-o.memories // tasks))
            memory.add(Batch.of(x, y, t))
        for _ in range(1 if isinstance(memory, Reservoir) else -(-getattr(o, "n_memories", 1) // size)):
            x, y = batch()
            learner.observe(x, t, y)
        learner.end_task(t)
    learner.begin_task(tasks)
    batches = [batch() for _ in range(8)]
    return (lambda i: learner.observe(batches[i % 8][0], tasks, batches[i % 8][1])), size, learner


def milliseconds(name: str, replicas: int, device: str, seconds: float) -> tuple[float, int]:
    """Per example and replica: the median over repetitions; and the examples of a batch."""
    observe, size, _ = learner_of(name, replicas, device)

    def timed(n):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for i in range(n):
            observe(i)
        if device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / n

    timed(3)
    n = max(1, int(seconds / 10 / timed(3)))
    return statistics.median(timed(n) for _ in range(10)) * 1000 / size / replicas, size


@dataclasses.dataclass(frozen=True)
class Options(OnDevice):
    models: tuple[str, ...] = option((), "rows to measure, all if not given")
    seconds: float = option(4.0, "spent on each figure", above=0, high=3600)


def main():
    args = options(Options, __doc__)
    known = [*ALGORITHMS, *VARIANTS]
    if unknown := [name for name in args.models if name not in known]:
        raise UserError(f"--models {unknown[0]} is not known: {nearest(unknown[0], known)}.")
    torch.manual_seed(0)

    names = ["online", *(name for name in args.models or known if name != "online")]
    rows, online = [], 0.0
    for name in names:
        (one, size), (five, _) = (milliseconds(name, n, args.device, args.seconds) for n in (1, 5))
        online = one if name == "online" else online
        rows.append(
            {
                "model": name,
                "batch": size,
                "ms_1_replica": round(one, 4),
                "ms_5_replicas": round(five, 4),
                "of_online": round(one / online, 1),
            }
        )
        print(f"{name:20} batch {size:3} {one:9.3f} ms {five:9.3f} ms with 5 replicas {one / online:7.1f} x online")
    write(args.out, {**machine(args), "unit": "ms per example and replica", "rows": rows})


if __name__ == "__main__":
    with one_sentence("benchmarks.observe"):
        main()
