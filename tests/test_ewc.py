"""EWC: the penalty's gradient against autograd, the importances against naive ones, and the whole update."""

import pytest
import torch

from model.ewc import EWC, EWCOptions
from tests.naive import NETWORK, SEEDS, batches, flat, gradient_of, tensors


def build(**changes):
    return EWC(NETWORK, EWCOptions(**{"lr": 0.1, "n_memories": 5, **changes}), SEEDS, dtype=torch.float64)


def test_the_gradient_of_the_penalty_is_autograds():
    learner = build(memory_strength=3.0)
    anchors = []
    for _ in range(3):
        fisher = torch.rand_like(learner.weights)
        anchors.append((fisher, learner.weights.clone()))
        learner.importance += fisher
        learner.anchor += fisher * learner.weights
        learner.weights += torch.randn_like(learner.weights)
    weights = learner.weights.clone().requires_grad_()
    penalty = 3.0 * sum((fisher * (weights - theta) ** 2).sum() for fisher, theta in anchors)
    torch.testing.assert_close(learner.penalty_gradient(), torch.autograd.grad(penalty, weights)[0])


@pytest.mark.parametrize("fisher", ["mean_of_squares", "square_of_mean"])
@pytest.mark.parametrize("keep", ["last", "first"])
def test_updates(fisher, keep):
    learner = build(memory_strength=2.0, fisher=fisher, keep=keep)
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    penalties = [[] for _ in SEEDS]
    for t in range(3):
        learner.begin_task(t)
        seen = list(batches(3, size=3))
        for x, y in ((x * (t + 1), y) for x, y in seen):
            learner.observe(x, t, y)
            for r in range(len(SEEDS)):
                weights = flat(theta[r])
                step = flat(gradient_of(theta[r], x[r], y[r]))
                step = step + sum(2 * 2.0 * f * (weights - old) for f, old in penalties[r])
                parts = (weights - 0.1 * step).split([w.numel() for w in theta[r]])
                theta[r] = [part.view_as(w) for part, w in zip(parts, theta[r], strict=True)]
        learner.end_task(t)
        for r in range(len(SEEDS)):
            x = torch.cat([x[r] * (t + 1) for x, _ in seen])
            y = torch.cat([y[r] for _, y in seen])
            x, y = (x[-5:], y[-5:]) if keep == "last" else (x[:5], y[:5])
            if fisher == "square_of_mean":
                importance = flat(gradient_of(theta[r], x, y)) ** 2
            else:
                single = [flat(gradient_of(theta[r], x[i : i + 1], y[i : i + 1])) ** 2 for i in range(5)]
                importance = sum(single) / 5
            penalties[r].append((importance, flat(theta[r])))
    for r in range(len(SEEDS)):
        torch.testing.assert_close(flat(tensors(learner.weights, r)), flat(theta[r]))


def test_importances_are_the_same_in_chunks_and_at_once(monkeypatch):
    whole, chunked = build(n_memories=30), build(n_memories=30)
    for learner, chunk in ((whole, 1000), (chunked, 7)):
        monkeypatch.setattr("model.ewc.CHUNK", chunk)
        for x, y in batches(8):
            learner.observe(x, 0, y)
        learner.end_task(0)
    torch.testing.assert_close(whole.importance, chunked.importance)
    assert (whole.importance > 0).any()
