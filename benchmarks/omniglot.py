#!/usr/bin/env python3
"""Milliseconds per meta-iteration and per meta-test step of ANML's published network, beside the published code.

    uv run python -m benchmarks.omniglot [--device cuda] [--threads 1] [--replicas 1 3] [--channels 256] [--out FILE]

Random images in the place of Omniglot's. meta_iteration: 20 inner steps of batch 1, then 84 images, and Adam on all of
the weights. meta_test_step: one image, Adam on the output layer, as utils.meta_test does it (features known) and as
`observe` does it (features computed). Figures are medians, per replica. The published code's (second order) are of one
core of a machine like the one that results/omniglot_cpu.json names, and of one replica, in an hour of unknown speed.
"""

import dataclasses
import statistics
import time
from types import SimpleNamespace

import torch

from benchmarks.common import OnDevice, machine, matmul_gflops, options, write
from model.adam import Adam
from model.batch import Batch
from model.finetune import head_loss_and_gradient
from model.networks import build_network
from utils.command_line import one_sentence
from utils.config import configure
from utils.options import option

SHAPE, CLASSES, BACKGROUND = (1, 28, 28), 1000, 100

#: Milliseconds of the published second-order code.
PUBLISHED = {"meta_iteration_second_order": 11_000, "meta_test_step": 21}


@dataclasses.dataclass(frozen=True)
class Options(OnDevice):
    replicas: tuple[int, ...] = option((1, 3), "numbers of replicas")
    channels: int = option(256, "of the prediction network", low=1, high=4096)
    seconds: float = option(20.0, "spent on each figure, at least", above=0, high=3600)


def median_ms(act, o: Options, replicas: int, least: int = 3) -> float:
    """Of calls of act, per replica, after two that are not counted."""
    found, began = [], 0.0
    for call in range(10**9):
        if call == 2:
            found, began = [], time.perf_counter()
        start = time.perf_counter()
        act()
        if o.device != "cpu":
            torch.cuda.synchronize(o.device)
        found.append(time.perf_counter() - start)
        if call >= 2 and len(found) >= least and time.perf_counter() - began >= o.seconds:
            return round(1000 * statistics.median(found) / replicas, 2)
    raise AssertionError


def learner_of(o: Options, replicas: int, *flags: str):
    config = configure(["--model", "anml", "--dataset", "omniglot", "--channels", str(o.channels), *flags])
    network = build_network(config.network, SHAPE, CLASSES)
    network = config.algorithm.network(network, 1, config.learner)
    return config.algorithm.learner(network, config.learner, range(replicas), device=o.device)


def meta_iteration(o: Options, replicas: int, second_order: str) -> float:
    learner = learner_of(o, replicas, "--second_order", second_order)
    images = torch.randint(0, 256, (BACKGROUND, 20, *SHAPE), dtype=torch.uint8).to(o.device)
    stream = SimpleNamespace(background=images, to_float=lambda x: x.float() / 255)
    return median_ms(lambda: learner.pretrain(stream, 0), o, replicas)


def meta_test_step(o: Options, replicas: int, features_known: bool) -> float:
    learner = learner_of(o, replicas)
    network, adam = learner.network, Adam()
    learner.begin_task(0)
    x, y = torch.rand(replicas, 1, *SHAPE, device=o.device), torch.zeros(replicas, 1, dtype=torch.long, device=o.device)
    if not features_known:
        return median_ms(lambda: learner.observe(x, 0, y), o, replicas, 20)
    head = learner.weights[:, network.first_column("head") :].clone()
    with torch.no_grad():
        features = network.features(learner.weights, x)

    def step():
        adam.step_(head, head_loss_and_gradient(network, head, Batch(features, y, y), features)[1], 0.001)

    return median_ms(step, o, replicas, 20)


def main():
    o = options(Options, __doc__)
    torch.manual_seed(0)
    measured = {
        "meta_iteration_first_order": lambda n: meta_iteration(o, n, "no"),
        "meta_iteration_second_order": lambda n: meta_iteration(o, n, "yes"),
        "meta_test_step": lambda n: meta_test_step(o, n, True),
        "meta_test_step_by_observe": lambda n: meta_test_step(o, n, False),
    }
    rows = []
    for name, measure in measured.items():
        found = {str(n): measure(n) for n in o.replicas}
        published = PUBLISHED.get(name)
        row = {"what": name, "ms_per_replica": found, "published_ms": published}
        row["matmul_gflops"] = round(matmul_gflops(o.device))
        row["times_faster"] = round(published / min(found.values()), 1) if published else None
        rows.append(row)
        print(f"{name:28}", *(f"{n} replicas {ms:9.2f} ms" for n, ms in found.items()), row["times_faster"], flush=True)
    write(o.out, {**machine(o), "channels": o.channels, "unit": "ms per replica", "rows": rows})


if __name__ == "__main__":
    with one_sentence("benchmarks.omniglot"):
        main()
