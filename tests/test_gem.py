"""GEM's programme against SciPy, the projections against what they promise, whole updates against naive ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from model import gem
from model.gem import AGEM, GEM, AGEMOptions, GEMOptions, multipliers
from tests.naive import NETWORK, SEEDS, batches, clipped, flat, gradient_of, stepped, tensors


def programme(tasks, rank, scale, seed):
    """Gradients of `tasks` tasks spanning `rank` dimensions, and a new gradient."""
    rng = np.random.default_rng(seed)
    memory = rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, 12)) * scale
    return memory, rng.normal(size=12) * scale


programmes = st.builds(
    programme,
    tasks=st.integers(1, 8),
    rank=st.integers(1, 8),
    scale=st.sampled_from([1e-4, 0.03, 1.0, 300.0]),
    seed=st.integers(0, 10_000),
)


@settings(max_examples=150, deadline=None)
@given(programmes, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(["quadprog", "nnls"]))
def test_the_programme_is_solved_as_scipy_solves_it(case, margin, solver):
    memory, gradient = case
    gram, inner = memory @ memory.T, memory @ gradient
    scale = np.trace(gram) / len(inner)
    ridge = 1e-6 * scale
    found = multipliers(gram, inner, margin, ridge, solver)
    assert (found >= margin).all()

    def value(v):
        return (v @ (gram + ridge * np.eye(len(v))) @ v / 2 + inner @ v) / scale

    def slope(v):
        return ((gram + ridge * np.eye(len(v))) @ v + inner) / scale

    reference = minimize(
        value, np.full(len(inner), margin), jac=slope, bounds=[(margin, None)] * len(inner), method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )  # fmt: skip
    assert value(found) <= value(reference.x) + 1e-6 * (1 + abs(reference.fun))


@settings(max_examples=150, deadline=None)
@given(programmes)
def test_without_margin_no_memory_gradient_disagrees_with_the_projection(case):
    memory, gradient = (torch.from_numpy(part) for part in case)
    projected = gem.project(gradient[None], memory[None], GEMOptions(n_memories=1, memory_strength=0.0))[0]
    size = float(memory.norm(dim=1).max() * gradient.norm())
    assert ((memory @ projected) >= -1e-4 * size).all()
    if ((memory @ gradient) >= 0).all():
        assert torch.equal(projected, gradient)
    else:
        assert projected.norm() <= gradient.norm() * (1 + 1e-6)


@pytest.mark.parametrize(
    ("gram", "inner"),
    [
        (np.full((2, 2), np.nan), np.ones(2)),
        (np.eye(2), np.array([np.inf, -1.0])),
        (np.zeros((2, 2)), np.zeros(2)),
    ],
)
def test_programmes_without_sense_project_nothing(gram, inner):
    assert multipliers(gram, inner, 0.5, 1e-3, "quadprog").tolist() == [0, 0]


def test_a_programme_that_quadprog_refuses_is_solved_by_least_squares(monkeypatch):
    gram, inner = np.ones((3, 3)), np.array([-1.0, -1.0, -1.0])
    expected = multipliers(gram, inner, 0.0, 1e-3, "quadprog")

    def refuse(*_):
        raise ValueError("matrix G is not positive definite")

    monkeypatch.setattr(gem.quadprog, "solve_qp", refuse)
    np.testing.assert_allclose(multipliers(gram, inner, 0.0, 1e-3, "quadprog"), expected, atol=1e-6)
    monkeypatch.setattr(gem.scipy.optimize, "nnls", lambda *_: (_ for _ in ()).throw(RuntimeError("too many steps")))
    assert multipliers(gram, inner, 0.0, 1e-3, "quadprog").tolist() == [0, 0, 0]


def test_the_ridge_survives_rounding():
    """Equal gradients of enormous norm: 1e-3 is lost beside 1e14, and quadprog alone would refuse."""
    gram = np.full((4, 4), 1e14)
    found = multipliers(gram, np.full(4, -1e14), 0.0, 1e-3, "quadprog")
    assert found.sum() == pytest.approx(1, rel=1e-3) and (found >= 0).all()


def test_a_sick_replica_does_not_stop_the_others():
    gradient, memory = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]), torch.tensor([[[-1.0, 1.0]]] * 2)
    projected = gem.project(gradient, memory, GEMOptions())
    torch.testing.assert_close(projected[0], torch.tensor([0.5, 0.5]), rtol=1e-4, atol=1e-4)
    assert projected[1].isnan().any()


def naive_kept(history, n):
    """The last n examples of every task: task -> (x, y)."""
    return {t: tuple(torch.cat(part)[-n:] for part in zip(*seen, strict=True)) for t, seen in history.items()}


def run_naively(learner, update, glances=1):
    """Feeds three tasks to the learner, and to `update`(theta, x, y, kept of the tasks before) for every replica."""
    theta = [tensors(learner.weights, r) for r in range(len(SEEDS))]
    history = [{} for _ in SEEDS]
    for t in range(3):
        for x, y in batches(4, size=3):
            x = x * (t + 1)
            learner.observe(x, t, y)
            for r in range(len(SEEDS)):
                history[r].setdefault(t, []).append((x[r], y[r]))
                kept = {k: v for k, v in naive_kept(history[r], learner.options.n_memories).items() if k < t}
                for _ in range(glances):
                    theta[r] = update(theta[r], x[r], y[r], kept)
    for r in range(len(SEEDS)):
        torch.testing.assert_close(flat(tensors(learner.weights, r)), flat(theta[r]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("small", [0, 10])
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_gem_updates(margin, limit, small, monkeypatch):
    monkeypatch.setattr(gem, "SMALL_RING", small)
    o = GEMOptions(lr=0.3, n_memories=5, memory_strength=margin, glances=2, grad_clip_norm=limit)
    projected = []

    def update(theta, x, y, kept):
        g = clipped(gradient_of(theta, x, y), limit)
        rows = [flat(clipped(gradient_of(theta, *kept[k]), limit)) for k in sorted(kept)]
        if rows and min(float(row @ flat(g)) for row in rows) < 0:
            projected.append(len(rows))
            matrix = torch.stack(rows).numpy()
            gram = matrix @ matrix.T
            v = multipliers(gram, matrix @ flat(g).numpy(), margin, 1e-6 * np.trace(gram) / len(rows), "nnls")
            step = flat(g) + torch.from_numpy(v @ matrix)
            g = [part.view_as(w) for part, w in zip(step.split([w.numel() for w in theta]), theta, strict=True)]
        return stepped(theta, g, 0.3)

    run_naively(GEM(NETWORK, o, SEEDS, dtype=torch.float64), update, glances=2)
    assert {1, 2} <= set(projected)


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("reference", ["memory_batch", "task_mean"])
def test_agem_updates(reference, protect):
    """With a reference batch as large as the memory nothing is left to chance."""
    o = AGEMOptions(lr=0.3, n_memories=5, reference=reference, protect_first_task=protect, grad_clip_norm=0.5)
    projected = []

    def update(theta, x, y, kept):
        kept = {k: v for k, v in kept.items() if protect or k > 0}
        g = flat(clipped(gradient_of(theta, x, y), 0.5))
        if kept:
            if reference == "task_mean":
                r = sum(flat(clipped(gradient_of(theta, *v), 0.5)) for v in kept.values()) / len(kept)
            else:
                pooled = (torch.cat(part) for part in zip(*kept.values(), strict=True))
                r = flat(clipped(gradient_of(theta, *pooled), 0.5))
            if g @ r < 0:
                projected.append(max(kept))
                g = g - (g @ r) / (r @ r) * r
                assert abs(float(g @ r)) < 1e-12
        parts = [part.view_as(w) for part, w in zip(g.split([w.numel() for w in theta]), theta, strict=True)]
        return stepped(theta, parts, 0.3)

    run_naively(AGEM(NETWORK, o, SEEDS, dtype=torch.float64), update)
    assert (0 in projected) == protect and 1 in projected


def test_agem_is_orthogonal_to_its_reference_after_projecting():
    learner = AGEM(NETWORK, AGEMOptions(n_memories=5, replay_batch_size=3), SEEDS, dtype=torch.float64)
    for x, y in batches():
        learner.observe(x, 0, y)
    reference = torch.randn_like(learner.weights)
    learner._reference = lambda earlier: reference
    gradient = torch.randn_like(learner.weights)
    for g in (gradient, gradient - 3 * reference, -reference):
        product = (learner._projected(g, 1) * reference).sum(dim=1)
        assert (product >= -1e-9).all()
        assert ((product.abs() < 1e-9) | ((g * reference).sum(dim=1) > 0)).all()


def test_agem_draws_its_reference_from_all_earlier_tasks_and_no_example_twice(monkeypatch):
    learner = AGEM(NETWORK, AGEMOptions(n_memories=4, replay_batch_size=3), SEEDS, dtype=torch.float64)
    references = {}
    for t in range(3):
        monkeypatch.setattr(gem, "loss_and_gradient", spy := Spy(gem.loss_and_gradient))
        for x, y in batches(6):
            learner.observe(x + t, t, y)
        references[t] = [batch for batch in spy.batches if batch.size == 3]
        monkeypatch.undo()
    assert [len(references[t]) for t in range(3)] == [0, 6, 6]
    assert {int(task) for batch in references[1] for task in batch.t.unique()} == {0}
    assert {int(task) for batch in references[2] for task in batch.t.unique()} == {0, 1}
    for batch in references[2]:
        assert all(len(set(map(tuple, x.tolist()))) == 3 for x in batch.x)


class Spy:
    """Remembers the batches that gradients were asked for."""

    def __init__(self, real):
        self.real, self.batches = real, []

    def __call__(self, network, weights, batch):
        self.batches.append(batch)
        return self.real(network, weights, batch)
