"""iCaRL: herding against a greedy search in NumPy, selection and prediction against naive ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.icarl import ICaRL, ICaRLOptions, herding
from model.networks import MLP
from tests.naive import NETWORK, SEEDS, batches, gradient_of, loss_of, tensors


def greedy(features, labels, targets, m):
    """classes x m indices: always the unused example that brings the mean nearest to the target; -1 if none is left."""
    picks = np.full((len(targets), m), -1)
    for c, target in enumerate(targets):
        unused = [i for i in range(len(labels)) if labels[i] == c]
        chosen = []
        for j in range(min(m, len(unused))):
            distances = [np.linalg.norm(target - features[[*chosen, i]].mean(axis=0)) for i in unused]
            chosen.append(unused.pop(int(np.argmin(distances))))
            picks[c, j] = chosen[-1]
    return picks


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(1, 6), st.integers(1, 4))
def test_herding_is_the_greedy_choice(seed, n, m, classes):
    rng = np.random.default_rng(seed)
    features, labels = rng.normal(size=(2, n, 4)), rng.integers(-1, classes, (2, n))
    targets = rng.normal(size=(2, classes, 4)) * 0.3
    picks = herding(*map(torch.from_numpy, (features, labels, targets)), m).numpy()
    for r in range(2):
        np.testing.assert_array_equal(picks[r], greedy(features[r], labels[r], targets[r], m))


def build(network=NETWORK, **changes):
    return ICaRL(network, ICaRLOptions(**{"lr": 0.1, "n_memories": 7, **changes}), SEEDS, dtype=torch.float64)


def learn(learner, t, only=None, n=6):
    for x, y in batches(n):
        learner.observe(x + t, t, y if only is None else torch.full_like(y, only))
    learner.end_task(t)


def kept(learner, r):
    """class -> examples, best first."""
    e = learner.exemplars
    order = e.rank[r].argsort(stable=True)
    return {c: [tuple(e.x[r, i].tolist()) for i in order if e.y[r, i] == c] for c in range(learner.network.classes)}


@pytest.mark.parametrize("kind", ["penultimate", "logits"])
def test_selection_and_prediction(kind):
    learner = build(features=kind)
    learn(learner, 0, n=12)
    for r in range(len(SEEDS)):
        w1, b1, w2, b2 = tensors(learner.weights, r)

        def phi(x, w1=w1, b1=b1, w2=w2, b2=b2):
            hidden = (x @ w1.T + b1).relu()
            return hidden @ w2.T + b2 if kind == "logits" else hidden / hidden.norm(dim=-1, keepdim=True).clamp(1e-12)

        def mean(features):
            centre = features.mean(dim=0)
            return centre if kind == "logits" else centre / centre.norm()

        x, y = torch.cat([x[r] for x, _ in batches(12)]), torch.cat([y[r] for _, y in batches(12)])
        targets = torch.stack([phi(x[y == c]).mean(dim=0) for c in range(3)])
        expected = greedy(phi(x).numpy(), y.numpy(), targets.numpy(), 7 // 3)
        found = kept(learner, r)
        for c in range(3):  # compared in feature space: examples that no unit responds to are all alike there
            torch.testing.assert_close(phi(torch.tensor(found[c], dtype=x.dtype)), phi(x[expected[c]]))
        means = torch.stack([mean(phi(torch.tensor(found[c], dtype=x.dtype))) for c in range(3)])
        predicted = learner.predict(x[None].expand(2, -1, -1), 0)[r]
        torch.testing.assert_close(predicted, -(torch.cdist(phi(x), means) ** 2))


def test_new_classes_take_room_from_old_ones_which_keep_their_best():
    learner = build(MLP(4, [5], 4))
    learn(learner, 0, only=2)
    before = [kept(learner, r) for r in range(len(SEEDS))]
    assert [[len(b[c]) for c in range(4)] for b in before] == [[0, 0, 7, 0]] * 2
    learn(learner, 1, only=0)
    for r in range(len(SEEDS)):
        after = kept(learner, r)
        assert [len(after[c]) for c in range(4)] == [3, 0, 3, 0]
        assert after[2] == before[r][2][:3]


@pytest.mark.parametrize("kind", ["penultimate", "logits"])
def test_the_target_is_the_mean_over_tasks_each_counting_once(kind, monkeypatch):
    learner, targets = build(features=kind, n_memories=30), []

    def spy(features, labels, means, m):
        targets.append(means)
        return herding(features, labels, means, m)

    monkeypatch.setattr("model.icarl.herding", spy)

    for t in range(3):
        for x, y in batches(6):
            learner.observe(x + t, t, y)
        features = learner._features(torch.cat([x + t for x, _ in batches(6)], dim=1))
        labels = torch.cat([y for _, y in batches(6)], dim=1)
        e = learner.exemplars
        old = None if e.y is None else (learner._features(e.x), e.y)
        learner.end_task(t)
        for r in range(len(SEEDS)):
            for c in range(3):
                expected = features[r][labels[r] == c].mean(dim=0)
                if old:
                    kept = old[0][r][old[1][r] == c].mean(dim=0)
                    expected = (t * kept + expected) / (t + 1)
                torch.testing.assert_close(targets[t][r, c], expected)


def test_of_equally_good_examples_the_first_is_chosen_whatever_rounding_says():
    """Two examples of a class are equally far from their mean: a packed run must break the tie as a solo run does."""
    angles = torch.rand(200, 2) * 6
    features = torch.stack([angles.cos(), angles.sin()], dim=2)
    labels, targets = torch.zeros(200, 2, dtype=int), features.mean(dim=1, keepdim=True)
    for noise in (0, 5e-7, -5e-7):
        picks = herding(features + noise * torch.randn(200, 2, 2), labels, targets, 2)[:, 0]
        assert (picks == torch.tensor([0, 1])).all()


def test_more_room_than_examples_costs_nothing_and_harms_nothing():
    learner = build(n_memories=10**6)
    learn(learner, 0)
    learn(learner, 1)
    assert [len(kept(learner, 0)[c]) for c in range(3)] == [
        int(sum((y[0] == c).sum() for _, y in batches(6))) * 2 for c in range(3)
    ]
    assert learner.exemplars.y.shape[1] == 48


def test_predictions_follow_the_weights_and_a_loaded_state():
    learner, other = build(), build()
    learn(learner, 0), learn(other, 5)
    x, y = next(batches(1))
    before, saved = learner.predict(x, 0), learner.state_dict()
    learner.observe(x, 1, y)
    assert not torch.equal(learner.predict(x, 0), before)
    other.predict(x, 0)
    other.load_state_dict(saved)
    assert torch.equal(other.predict(x, 0), before)


def test_the_loss_distils_what_the_network_said_of_one_exemplar_per_class():
    learner = build(memory_strength=2.0, grad_clip_norm=0.0)
    learn(learner, 0)
    weights = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    drawn = []
    draw = learner._draw_exemplars
    learner._draw_exemplars = lambda: drawn.append(draw()) or drawn[-1]
    x, y = next(batches(1))
    e = learner.exemplars
    teacher = torch.stack([learner.network(learner.weights, e.x)]).softmax(dim=-1)[0]
    torch.testing.assert_close(teacher, e.outputs)
    learner.observe(x + 1, 1, y)
    ((index, known),) = drawn
    assert known.all()
    for r in range(len(SEEDS)):
        assert e.y[r, index[r]].tolist() == [0, 1, 2]
        theta = [w.requires_grad_() for w in weights[r]]
        w1, b1, w2, b2 = theta
        log_p = ((e.x[r, index[r]] @ w1.T + b1).relu() @ w2.T + b2).log_softmax(dim=1)
        divergence = torch.nn.functional.kl_div(log_p, e.outputs[r, index[r]], reduction="batchmean")
        gradients = torch.autograd.grad(loss_of(theta, x[r] + 1, y[r]) + 2.0 * divergence, theta)
        expected = [w - 0.1 * g for w, g in zip(theta, gradients, strict=True)]
        torch.testing.assert_close(tensors(learner.weights, r), [w.detach() for w in expected])


def test_without_exemplars_it_is_sgd_and_the_network_predicts():
    learner = build(grad_clip_norm=0.0)
    theta = tensors(learner.weights, 0)
    x, y = next(batches(1))
    torch.testing.assert_close(learner.predict(x, 0), learner.network(learner.weights, x))
    learner.observe(x, 0, y)
    expected = [w - 0.1 * g for w, g in zip(theta, gradient_of(theta, x[0], y[0]), strict=True)]
    torch.testing.assert_close(tensors(learner.weights, 0), [w.detach() for w in expected])


def test_examples_of_later_epochs_are_not_candidates_twice():
    learner = build(n_memories=100)
    for epoch in range(2):
        learner.begin_epoch(epoch)
        for x, y in batches(4):
            learner.observe(x, 0, y)
    learner.end_task(0)
    assert (learner.exemplars.y >= 0).sum(dim=1).tolist() == [16, 16]
