"""MER against its algorithms written down naively, and the two limits of its interpolations."""

import pytest
import torch

from model.mer import MER, MERAlg6, MERAlg6Options, MERAlg7, MERAlg7Options, MEROptions
from model.online import Online, OnlineOptions
from tests.naive import NETWORK, SEEDS, batches, clipped, gradient_of, stepped, taken, tensors

EXACT = {"rtol": 0, "atol": 0}


def build(learner, options, seeds=SEEDS, **changes):
    return learner(NETWORK, options(**{"lr": 0.2, "replay_batch_size": 3, **changes}), seeds, dtype=torch.float64)


def single_steps(theta, examples, rates, limit):
    for (x, y), rate in zip(examples, rates, strict=True):
        theta = stepped(theta, clipped(gradient_of(theta, x[None], y[None]), limit), rate)
    return theta


def between(start, end, share):
    return [a + share * (b - a) for a, b in zip(start, end, strict=True)]


def replayed(drawn, r):
    return [] if drawn is None else list(zip(drawn.x[r], drawn.y[r], strict=True))


@pytest.mark.parametrize("limit", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_algorithm_1(gamma, limit, events):
    learner = build(MER, MEROptions, beta=0.4, gamma=gamma, batches_per_example=2, grad_clip_norm=limit)
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    for x, y in batches():
        learner.observe(x, 0, y)
        assert [name for name, _ in events] == ["sample", "sample", "add"] * y.shape[1]
        draws = iter(taken(events, "sample"))
        for i in range(y.shape[1]):
            drawn = [next(draws), next(draws)]
            for r in range(len(SEEDS)):
                across = theta[r]
                for some in drawn:
                    within = theta[r]
                    chain = [(x[r, i], y[r, i]), *replayed(some, r)]
                    theta[r] = between(within, single_steps(within, chain, [0.2] * len(chain), limit), 0.4)
                theta[r] = between(across, theta[r], gamma)
    for r in range(len(SEEDS)):
        torch.testing.assert_close(tensors(learner.weights, r), theta[r])


def test_algorithm_6(events):
    learner = build(MERAlg6, MERAlg6Options, gamma=0.4, batches_per_example=2)
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    for x, y in batches():
        learner.observe(x, 0, y)
        draws = iter(taken(events, "sample"))
        for i in range(y.shape[1]):
            for some in (next(draws), next(draws)):
                for r in range(len(SEEDS)):
                    chain = [*replayed(some, r), (x[r, i], y[r, i])]
                    theta[r] = between(theta[r], single_steps(theta[r], chain, [0.2] * len(chain), 0), 0.4)
    for r in range(len(SEEDS)):
        torch.testing.assert_close(tensors(learner.weights, r), theta[r])


def test_algorithm_7(events, monkeypatch):
    learner = build(MERAlg7, MERAlg7Options, gamma=0.4, s=3.0)
    orders, draw = [], MERAlg7._orders
    monkeypatch.setattr(MERAlg7, "_orders", lambda self, batch: orders.append(draw(self, batch)) or orders[-1])
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    first_places = set()
    for x, y in batches(5):
        learner.observe(x, 0, y)
        for i, (some, order) in enumerate(zip(taken(events, "sample"), orders, strict=True)):
            for r in range(len(SEEDS)):
                chain = [(x[r, i], y[r, i]), *replayed(some, r)]
                places = order[r].tolist()
                assert sorted(places) == list(range(len(chain)))
                first_places.add(places.index(0))
                rates = [0.2 * (3.0 if place == 0 else 1.0) for place in places]
                theta[r] = between(theta[r], single_steps(theta[r], [chain[p] for p in places], rates, 0), 0.4)
        orders.clear()
    assert first_places == {0, 1, 2, 3}
    for r in range(len(SEEDS)):
        torch.testing.assert_close(tensors(learner.weights, r), theta[r])


def test_kept_whole_it_is_plain_sgd():
    learner = build(MER, MEROptions, replay_batch_size=0, batches_per_example=1, beta=1.0, gamma=1.0)
    plain = Online(NETWORK, OnlineOptions(lr=0.2), SEEDS, dtype=torch.float64)
    for x, y in batches():
        learner.observe(x, 0, y)
        for i in range(y.shape[1]):
            plain.observe(x[:, i : i + 1], 0, y[:, i : i + 1])
    torch.testing.assert_close(learner.weights, plain.weights)


@pytest.mark.parametrize(
    ("learner", "options", "kept"),
    [
        (MER, MEROptions, {"beta": 0.0, "gamma": 1.0}),
        (MER, MEROptions, {"beta": 1.0, "gamma": 0.0}),
        (MERAlg6, MERAlg6Options, {"gamma": 0.0}),
        (MERAlg7, MERAlg7Options, {"gamma": 0.0}),
    ],
)
def test_nothing_kept_leaves_the_weights_as_they_are(learner, options, kept):
    learner = build(learner, options, **kept)
    before = learner.weights.clone()
    for x, y in batches():
        learner.observe(x, 0, y)
    torch.testing.assert_close(learner.weights, before, **EXACT)
