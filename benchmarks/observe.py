#!/usr/bin/env python3
"""Milliseconds per observed example of every algorithm, in one run on one machine.

    uv run python -m benchmarks.observe [--device cuda] [--threads 1] [--models mer gem] [--out FILE]

Each algorithm runs with its default settings for mnist_rotations (papers/; see --show_config), on random images
of that size: ten tasks are observed until memories are full, then examples of the eleventh are timed. Figures are the
median over repetitions, per example and replica, for 1 and for 5 replicas; "x online" is the ratio to `online` with one
replica, which takes examples one by one; others take the batches that are printed.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from model.networks import build_network
from model.registry import ALGORITHMS
from utils.config import configure

TASKS = 10


def learner_of(name: str, replicas: int, device: str):
    """The learner after ten tasks, and a function that observes one more batch of the next."""
    config = configure(["--model", name, "--dataset", "mnist_rotations"])
    network = config.algorithm.network(build_network(config.network, (784,), 10), TASKS + 1)
    learner = config.algorithm.learner(network, config.learner, range(replicas), device=device)
    rng = np.random.default_rng(0)
    size, o = config.run.batch_size, config.learner
    wanted = max(getattr(o, "memories", 0) / TASKS, getattr(o, "n_memories", 0), size)

    def batch():
        x = torch.from_numpy(rng.random((replicas, size, 784), dtype=np.float32)).to(device)
        return x, torch.from_numpy(rng.integers(0, 10, (replicas, size))).to(device)

    for t in range(TASKS):
        learner.begin_task(t)
        for _ in range(int(-(-wanted // size))):
            x, y = batch()
            learner.observe(x, t, y)
        learner.end_task(t)
    learner.begin_task(TASKS)
    batches = [batch() for _ in range(8)]
    return (lambda i: learner.observe(batches[i % 8][0], TASKS, batches[i % 8][1])), size


def milliseconds(name: str, replicas: int, device: str, seconds: float) -> tuple[float, int]:
    """Per example and replica: the median over repetitions; and the examples of a batch."""
    observe, size = learner_of(name, replicas, device)

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seconds", type=float, default=4, help="spent on each figure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    names = ["online", *(name for name in args.models if name != "online")]
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
        print(f"{name:12} batch {size:3} {one:9.3f} ms {five:9.3f} ms with 5 replicas {one / online:7.1f} x online")
    if args.out:
        machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
        about = {"device": args.device, "machine": machine, "threads": args.threads, "torch": torch.__version__}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, "unit": "ms per example and replica", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
