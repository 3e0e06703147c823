"""Whole updates of every learner against a second derivation: one replica at a time, plain autograd, float64.

What the learner draws (orders, replayed examples) is recorded and given to the naive version; everything else (inner
steps, meta-set, relu, clipping, which rates step the weights, when examples are remembered) is derived anew here.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.er import ER, EROptions, ERTasks
from model.la_er import LaER, LaEROptions
from model.lookahead import LookaheadMAML, LookaheadOptions
from model.online import Online, OnlineOptions
from tests.naive import NETWORK, SEEDS, batches, clipped, loss_of, taken, tensors, together


def naive_glance(theta, alpha, x, y, meta_x, meta_y, o):
    """One meta-update of one replica. Returns the new weights and rates."""
    theta = [w.requires_grad_() for w in theta]
    alpha = [a.requires_grad_() for a in alpha]
    fast, losses = theta, []
    for part in np.array_split(np.arange(len(y)), o.inner_steps or len(y)):
        gradients = torch.autograd.grad(loss_of(fast, x[part], y[part]), fast, create_graph=o.second_order)
        if o.inner_clip and o.grad_clip_norm:
            gradients = [g.clamp(-o.grad_clip_norm, o.grad_clip_norm) for g in gradients]
        steps = [F.relu(a) if o.inner_rates == "relu" else a for a in alpha]
        fast = [w - s * g for w, s, g in zip(fast, steps, gradients, strict=True)]
        losses.append(loss_of(fast, meta_x, meta_y))
    meta = losses[-1] if o.meta_loss == "last" else sum(losses) / len(losses)
    found = torch.autograd.grad(meta, theta + alpha)
    by_theta = clipped(found[: len(theta)], o.grad_clip_norm)
    by_alpha = clipped(found[len(theta) :], o.grad_clip_norm)
    with torch.no_grad():
        if o.learn_lr:
            alpha = [a - o.opt_lr * g for a, g in zip(alpha, by_alpha, strict=True)]
        rates = [o.opt_wt] * len(alpha) if o.sync_update else [F.relu(a) for a in alpha]
        theta = [w - r * g for w, r, g in zip(theta, rates, by_theta, strict=True)]
    return [w.detach() for w in theta], [a.detach() for a in alpha]


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("meta_loss", ["all", "last"])
@pytest.mark.parametrize(
    "change",
    [
        {"learn_lr": True, "sync_update": False},
        {"learn_lr": True, "sync_update": True},
        {"learn_lr": False, "sync_update": True},
        {"learn_lr": True, "sync_update": False, "inner_rates": "raw", "inner_steps": 2, "inner_clip": False},
        {"learn_lr": True, "sync_update": False, "grad_clip_norm": 0.0},
    ],
)
def test_look_ahead_updates(change, second_order, meta_loss, events, monkeypatch):
    options = {"grad_clip_norm": 0.3, "opt_lr": 0.2, "opt_wt": 0.15, "glances": 2, "replay_batch_size": 3, **change}
    o = LookaheadOptions(second_order=second_order, meta_loss=meta_loss, **options)
    learner = LookaheadMAML(NETWORK, o, SEEDS, dtype=torch.float64)
    torch.manual_seed(0)
    learner.rates = torch.randn_like(learner.rates) * 0.2  # a good part of them negative
    orders = []
    draw = LookaheadMAML._orders
    monkeypatch.setattr(LookaheadMAML, "_orders", lambda self, batch: orders.append(draw(self, batch)) or orders[-1])
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    alpha = [tensors(learner.rates, r) for r in range(len(SEEDS))]
    for x, y in batches():
        learner.observe(x, 0, y)
        assert [name for name, _ in events] == ["sample", "add", "sample"]
        replayed = taken(events, "sample")
        assert not torch.equal(orders[-1], orders[-2])
        for r in range(len(SEEDS)):
            for drawn, order in zip(replayed, orders[-2:], strict=True):
                glance_x, glance_y = x[r][order[r]], y[r][order[r]]
                meta_x, meta_y = together(drawn, r, glance_x, glance_y)
                theta[r], alpha[r] = naive_glance(theta[r], alpha[r], glance_x, glance_y, meta_x, meta_y, o)
    for r in range(len(SEEDS)):
        torch.testing.assert_close(tensors(learner.weights, r), theta[r])
        torch.testing.assert_close(tensors(learner.rates, r), alpha[r])


@pytest.mark.parametrize("limit", [0.0, 0.3])
@pytest.mark.parametrize("kind", [ER, ERTasks])
def test_replay_updates(kind, limit, events):
    o = EROptions(lr=0.2, glances=2, replay_batch_size=3, grad_clip_norm=limit)
    learner = kind(NETWORK, o, SEEDS, dtype=torch.float64)
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    mixed = 0
    for t, (x, y) in enumerate(batches(4)):
        learner.observe(x, t, y)
        assert [name for name, _ in events] == ["sample", "sample", "add"]
        for drawn in taken(events, "sample"):
            for r in range(len(SEEDS)):
                weights = [w.requires_grad_() for w in theta[r]]
                xs, ys = together(drawn, r, x[r], y[r])
                if kind is ERTasks:
                    tasks = torch.cat([drawn.t[r] if drawn else torch.tensor([], dtype=int), torch.full_like(y[r], t)])
                    mixed += len(tasks.unique()) > 1
                    loss = sum(loss_of(weights, xs[tasks == k], ys[tasks == k]) for k in tasks.unique())
                else:
                    loss = loss_of(weights, xs, ys)
                gradients = torch.autograd.grad(loss, weights)
                steps = zip(weights, clipped(gradients, limit), strict=True)
                theta[r] = [(w - 0.2 * g).detach() for w, g in steps]
    assert mixed or kind is ER
    for r in range(len(SEEDS)):
        torch.testing.assert_close(tensors(learner.weights, r), theta[r])


@pytest.mark.parametrize("change", [{}, {"second_order": True, "inner_rates": "raw"}, {"inner_clip": False}])
def test_la_er_updates(change, events, monkeypatch):
    o = LaEROptions(glances=2, replay_batch_size=3, inner_steps=2, opt_lr=0.2, grad_clip_norm=0.3, **change)
    learner = LaER(NETWORK, o, SEEDS, dtype=torch.float64)
    torch.manual_seed(0)
    learner.rates = torch.randn_like(learner.rates) * 0.2
    orders, draw = [], LookaheadMAML._orders
    monkeypatch.setattr(LookaheadMAML, "_orders", lambda self, batch: orders.append(draw(self, batch)) or orders[-1])
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    alpha = [tensors(learner.rates, r) for r in range(len(SEEDS))]
    as_lookahead = LookaheadOptions(
        learn_lr=True,
        sync_update=True,
        opt_wt=0.0,
        opt_lr=0.2,
        meta_loss="last",
        grad_clip_norm=0.3,
        inner_steps=2,
        **change,
    )
    for x, y in batches():
        learner.observe(x, 0, y)
        assert [name for name, _ in events] == ["sample", "sample", "add"]
        for drawn, order in zip(taken(events, "sample"), orders[-2:], strict=True):
            for r in range(len(SEEDS)):
                glance_x, glance_y = x[r][order[r]], y[r][order[r]]
                meta_x, meta_y = together(drawn, r, glance_x, glance_y)
                _, alpha[r] = naive_glance(theta[r], alpha[r], glance_x, glance_y, meta_x, meta_y, as_lookahead)
                weights = [w.detach().requires_grad_() for w in theta[r]]
                step = clipped(torch.autograd.grad(loss_of(weights, meta_x, meta_y), weights), 0.3)
                theta[r] = [(w - F.relu(a) * g).detach() for w, a, g in zip(weights, alpha[r], step, strict=True)]
    for r in range(len(SEEDS)):
        torch.testing.assert_close(tensors(learner.weights, r), theta[r])
        torch.testing.assert_close(tensors(learner.rates, r), alpha[r])


def test_online_updates():
    learner = Online(NETWORK, OnlineOptions(lr=0.2), SEEDS, dtype=torch.float64)
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    for x, y in batches():
        learner.observe(x, 0, y)
        for r in range(len(SEEDS)):
            weights = [w.requires_grad_() for w in theta[r]]
            gradients = torch.autograd.grad(loss_of(weights, x[r], y[r]), weights)
            theta[r] = [(w - 0.2 * g).detach() for w, g in zip(weights, gradients, strict=True)]
    for r in range(len(SEEDS)):
        torch.testing.assert_close(tensors(learner.weights, r), theta[r])


@pytest.mark.parametrize(
    ("learner", "expected"),
    [
        (LookaheadMAML(NETWORK, LookaheadOptions(glances=2), SEEDS), [1, 0]),
        (ER(NETWORK, EROptions(glances=2), SEEDS), [1, 0]),
        (ER(NETWORK, EROptions(glances=2, remember="every_epoch"), SEEDS), [1, 1]),
    ],
)
def test_examples_are_offered_to_the_memory_once(learner, expected, events):
    x, y = next(batches())
    for epoch, times in enumerate(expected):
        learner.begin_epoch(epoch)
        learner.observe(x.float(), 0, y)
        added = taken(events, "add")
        assert len(added) == times
        for batch in added:
            assert torch.equal(batch.y.sort().values, y.sort().values)
