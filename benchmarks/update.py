#!/usr/bin/env python3
"""Milliseconds per outer update of La-MAML on the MNIST network, several ways, in one run on one machine.

    uv run python -m benchmarks.update [--device cuda] [--threads 1] [--out benchmarks/results/update-NAME.json]

One outer update: 10 inner steps of one example each, the meta-loss on 10 + 10 examples after every step, first order.
"one replica, plain autograd" is the algorithm written down the obvious way, a list of tensors and torch.autograd.grad,
as research code does; the ratios are against it. Every figure is the median of several repetitions, per replica.
"""

import random
import statistics
import time

import torch
from torch.nn import functional

from benchmarks.common import OnDevice, machine, options, write
from model.lookahead import LookaheadMAML, LookaheadOptions
from model.networks import MLP
from utils.command_line import one_sentence

BATCH, REPLAY, MEMORY = 10, 10, 200


class AutogradOnly(MLP):
    """The network without its written-out gradient."""

    loss_and_gradient = property()


class Plain:
    """First-order La-MAML for one replica, in the obvious way: Python lists and autograd."""

    def __init__(self, device):
        sizes = [(100, 784), (100,), (100, 100), (100,), (10, 100), (10,)]
        self.weights = [torch.randn(s, device=device) * 0.03 for s in sizes]
        self.rates = [torch.full(s, 0.15, device=device) for s in sizes]
        self.memory = [(torch.rand(784), random.randrange(10)) for _ in range(MEMORY)]
        self.device = device

    def forward(self, weights, x):
        w1, b1, w2, b2, w3, b3 = weights
        return functional.linear(functional.linear(functional.linear(x, w1, b1).relu(), w2, b2).relu(), w3, b3)

    def observe(self, x, y):
        order = list(range(len(self.memory)))
        random.shuffle(order)
        drawn = [self.memory[i] for i in order[:REPLAY]]
        meta_x = torch.cat([torch.stack([image for image, _ in drawn]).to(self.device), x])
        meta_y = torch.cat([torch.tensor([label for _, label in drawn], device=self.device), y])
        theta = [w.clone().requires_grad_() for w in self.weights]
        rates = [r.clone().requires_grad_() for r in self.rates]
        fast, losses = theta, []
        for i in range(len(x)):
            loss = functional.cross_entropy(self.forward(fast, x[i : i + 1]), y[i : i + 1])
            gradients = torch.autograd.grad(loss, fast)
            fast = [w - r.relu() * g for w, r, g in zip(fast, rates, gradients, strict=True)]
            losses.append(functional.cross_entropy(self.forward(fast, meta_x), meta_y))
        gradients = torch.autograd.grad(sum(losses) / len(losses), theta + rates)
        for part, by in ((self.rates, gradients[6:]), (self.weights, gradients[:6])):
            scale = min(1.0, 2.0 / float(torch.stack([g.norm() for g in by]).norm()))
            for i, g in enumerate(by):
                part[i] = part[i] - (0.3 if part is self.rates else self.rates[i].relu()) * scale * g


def ours(replicas, device, network, **options):
    learner = LookaheadMAML(
        network(784, [100, 100], 10),
        LookaheadOptions(glances=1, memories=MEMORY, replay_batch_size=REPLAY, alpha_init=0.15, opt_lr=0.3, **options),
        range(replicas),
        device=device,
    )
    x, y = torch.rand(replicas, BATCH, 784, device=device), torch.randint(10, (replicas, BATCH), device=device)
    for _ in range(MEMORY // BATCH):
        learner.observe(x, 0, y)
    return lambda: learner.observe(x, 0, y)


def milliseconds(step, device, repetitions=15, steps=8) -> float:
    """Median over repetitions of the mean over steps."""

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    times = []
    for _ in range(repetitions):
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        times.append((time.perf_counter() - started) / steps * 1000)
    return statistics.median(times)


def main():
    args = options(OnDevice, __doc__)
    torch.manual_seed(0)
    random.seed(0)

    plain = Plain(args.device)
    x, y = torch.rand(BATCH, 784, device=args.device), torch.randint(10, (BATCH,), device=args.device)
    rows = [("one replica, plain autograd", 1, milliseconds(lambda: plain.observe(x, y), args.device))]
    for label, network, settings in (
        ("ours, autograd", AutogradOnly, {}),
        ("ours", MLP, {}),
        ("ours, meta-loss at the last step only", MLP, {"meta_loss": "last"}),
        ("ours, second order", MLP, {"second_order": True}),
    ):
        for replicas in (1, 5):
            measured = milliseconds(ours(replicas, args.device, network, **settings), args.device) / replicas
            rows.append((f"{label}, {replicas} replica{'s' * (replicas > 1)}", replicas, measured))

    base = rows[0][2]
    found = [
        {"what": what, "replicas": n, "ms_per_replica": round(ms, 3), "speedup": round(base / ms, 2)}
        for what, n, ms in rows
    ]
    for row in found:
        print(f"{row['what']:52} {row['ms_per_replica']:8.2f} ms per replica {row['speedup']:7.2f} x")
    write(args.out, {**machine(args), "rows": found})


if __name__ == "__main__":
    with one_sentence("benchmarks.update"):
        main()
