"""What holds for every algorithm. A new algorithm joins with one row in ROWS."""

import dataclasses
import io

import numpy as np
import pytest
import torch

from model.memory import Reservoir, TaskRings
from model.networks import MLP
from model.registry import ALGORITHMS

#: name -> options that make it learn a toy task in a few batches, and reach all of its code.
ROWS = {
    "online": {"lr": 0.1},
    "iid": {"lr": 0.1},
    "er": {"lr": 0.1, "memories": 12, "replay_batch_size": 6, "glances": 2, "grad_clip_norm": 2.0},
    "cmaml": {"memories": 12, "replay_batch_size": 6, "glances": 2, "alpha_init": 0.05, "use_old_task_memory": True},
    "sync": {
        "memories": 12,
        "replay_batch_size": 6,
        "glances": 2,
        "alpha_init": 0.05,
        "second_order": True,
        "inner_steps": 2,
    },
    "lamaml": {"memories": 12, "replay_batch_size": 6, "glances": 2, "alpha_init": 0.1, "opt_lr": 0.2},
    "oml": {"memories": 12, "replay_batch_size": 6, "glances": 2, "alpha_init": 0.05, "zap": "none"},
    "anml": {"memories": 12, "replay_batch_size": 6, "glances": 2, "alpha_init": 0.05, "zap": "none"},
    "er_tasks": {"lr": 0.1, "memories": 12, "replay_batch_size": 6, "glances": 2},
    "la_er": {"memories": 12, "replay_batch_size": 6, "glances": 2, "inner_steps": 2},
    "meta_bgd": {
        "memories": 12,
        "replay_batch_size": 6,
        "glances": 2,
        "inner_steps": 2,
        "mean_eta": 8.0,
        "std_init": 0.05,
    },
    "gem": {"lr": 0.2, "n_memories": 4, "glances": 2, "memory_strength": 0.1},
    "agem": {"lr": 0.2, "n_memories": 4, "replay_batch_size": 3, "glances": 2},
    "ewc": {"lr": 0.1, "n_memories": 5, "memory_strength": 5.0},
    "icarl": {"lr": 0.1, "n_memories": 6, "glances": 2},
    "independent": {"lr": 0.2},
    "taskinput": {"lr": 0.1},
    "mer": {"memories": 12, "replay_batch_size": 4, "lr": 0.1, "beta": 0.3, "gamma": 0.8, "batches_per_example": 2},
    "mer_alg6": {"memories": 12, "replay_batch_size": 4, "lr": 0.1, "gamma": 0.3, "batches_per_example": 2},
    "mer_alg7": {"memories": 12, "replay_batch_size": 4, "lr": 0.1, "gamma": 0.3, "s": 2.0},
}

#: name -> changes of single options, each of which must change what is learnt.
EFFECTS = {
    "online": [{"lr": 0.2}],
    "iid": [{"lr": 0.2}],
    "er": [
        {"lr": 0.2}, {"memories": 5}, {"replay_batch_size": 2}, {"reservoir": "inclusive"}, {"replacement": True},
        {"glances": 1}, {"grad_clip_norm": 0.1}, {"lr": 0.3, "grad_clip_norm": 0.0}, {"remember": "every_epoch"},
    ],
    "cmaml": [{"opt_wt": 0.05}, {"alpha_init": 0.1}, {"use_old_task_memory": False}, {"snapshot": "live"}],
    "sync": [{"opt_wt": 0.05}, {"opt_lr": 0.5}, {"second_order": False}, {"inner_steps": 0}, {"sync_update": False}],
    "lamaml": [
        {"opt_lr": 0.1}, {"alpha_init": 0.2}, {"memories": 5}, {"replay_batch_size": 2}, {"reservoir": "inclusive"},
        {"replacement": True}, {"glances": 1}, {"inner_steps": 2}, {"second_order": True}, {"meta_loss": "last"},
        {"grad_clip_norm": 0.1}, {"grad_clip_norm": 0.1, "inner_clip": False}, {"use_old_task_memory": True},
        {"learn_lr": False}, {"sync_update": True}, {"opt_lr": 5.0, "inner_rates": "raw"},
    ],
    "oml": [
        {"scope": "all"}, {"gate": True}, {"zap": "row"}, {"learn_lr": True}, {"learn_lr": True, "sync_update": False},
        {"online": "finetune"}, {"online": "finetune", "finetune_scope": "all"},
        {"online": "finetune", "finetune_lr": 0.1}, {"online": "finetune", "reset_head": False},
        {"head": "prototype"}, {"opt_wt": 0.05}, {"alpha_init": 0.1},
    ],
    "anml": [
        {"scope": "head"}, {"scope": "all"}, {"gate": False}, {"gate_width": 1.0}, {"gate_bias": 2.0},
        {"gate_lr": 0.1}, {"zap": "row"}, {"second_order": True},
        {"online": "finetune", "finetune_scope": "prediction"},
        {"learn_lr": True, "inner_rates": "raw"},
    ],
    "er_tasks": [{"lr": 0.2}, {"memories": 5}, {"replay_batch_size": 2}, {"glances": 1}, {"grad_clip_norm": 0.1}],
    "la_er": [
        {"alpha_init": 0.2}, {"opt_lr": 0.5}, {"glances": 1}, {"inner_steps": 1}, {"second_order": True},
        {"memories": 5}, {"grad_clip_norm": 0.1}, {"grad_clip_norm": 0.1, "inner_clip": False},
        {"opt_lr": 5.0, "inner_rates": "raw"}, {"remember": "every_epoch"},
    ],
    "meta_bgd": [
        {"alpha_init": 0.2}, {"glances": 1}, {"inner_steps": 1}, {"second_order": False}, {"memories": 5},
        {"grad_clip_norm": 0.1}, {"train_mc_iters": 3}, {"std_init": 0.1}, {"mean_eta": 4.0},
        {"bgd_scale": "incoming"}, {"sample_rates": True}, {"sample_rates": True, "std_init": 0.2},
        {"sample_rates": True, "std_init": 0.2, "inner_rates": "raw"},
    ],
    "gem": [
        {"lr": 0.1}, {"n_memories": 2}, {"glances": 1}, {"grad_clip_norm": 0.1}, {"memory_strength": 1.0},
        {"ridge": "absolute"},
    ],
    "agem": [
        {"lr": 0.1}, {"n_memories": 2}, {"replay_batch_size": 1}, {"glances": 1}, {"grad_clip_norm": 0.1},
        {"reference": "task_mean"}, {"protect_first_task": False},
        {"reference": "task_mean", "protect_first_task": False},
    ],
    "ewc": [{"lr": 0.2}, {"n_memories": 4}, {"memory_strength": 1.0}, {"fisher": "square_of_mean"}, {"keep": "first"}],
    "icarl": [
        {"lr": 0.2}, {"n_memories": 3}, {"memory_strength": 3.0}, {"glances": 1}, {"grad_clip_norm": 0.1},
        {"features": "logits"},
    ],
    "independent": [{"lr": 0.1}, {"finetune": False}],
    "taskinput": [{"lr": 0.2}],
    "mer": [
        {"lr": 0.2}, {"beta": 0.5}, {"gamma": 1.0}, {"batches_per_example": 1}, {"memories": 5},
        {"replay_batch_size": 2}, {"reservoir": "inclusive"}, {"replacement": True}, {"grad_clip_norm": 0.1},
    ],
    "mer_alg6": [{"lr": 0.2}, {"gamma": 1.0}, {"batches_per_example": 1}, {"grad_clip_norm": 0.1}, {"memories": 5}],
    "mer_alg7": [{"lr": 0.2}, {"gamma": 1.0}, {"s": 1.0}, {"grad_clip_norm": 0.1}, {"memories": 5}],
}  # fmt: skip

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(name, seeds=(0, 1, 2), **changes):
    algorithm = ALGORITHMS[name]
    options = algorithm.options(**{**algorithm.presets, **ROWS[name], **changes})
    return algorithm.learner(algorithm.network(MLP(5, [8], 3), 2, options), options, seeds)


def stream(seeds, tasks=2, batches=6, batch=4):
    """Two toy tasks (the second with two classes exchanged), as (x, t, y), drawn separately for every seed."""
    centres = torch.eye(3, 5) * 3
    for t in range(tasks):
        for i in range(batches):
            rngs = [np.random.default_rng([seed, t, i]) for seed in seeds]
            y = torch.from_numpy(np.stack([rng.integers(0, 3, batch) for rng in rngs]))
            noise = torch.from_numpy(np.stack([rng.normal(0, 0.3, (batch, 5)) for rng in rngs])).float()
            yield centres[y] + noise, t, (y if t == 0 else (2 - y))


def learn(learner, tasks=2, epochs=1, **size):
    losses = []
    for t in range(tasks):
        learner.begin_task(t)
        for epoch in range(epochs):
            learner.begin_epoch(epoch)
            losses += [learner.observe(x, t, y) for x, of, y in stream(learner.seeds, tasks, **size) if of == t]
        learner.end_task(t)
    return torch.stack(losses)


def test_every_algorithm_has_its_rows():
    assert set(ROWS) == set(EFFECTS) == set(ALGORITHMS)


def changes(name):
    return [pytest.param(name, change, id=f"{name}-{change}") for change in EFFECTS[name]]


@pytest.mark.parametrize(("name", "change"), [case for name in EFFECTS for case in changes(name)])
def test_every_option_has_an_effect(name, change):
    *setting, _ = change.items()  # what comes before the last is set on both sides
    plain, changed = build(name, **dict(setting)), build(name, **change)
    learn(plain, epochs=2), learn(changed, epochs=2)
    assert not torch.equal(plain.weights, changed.weights)
    assert changed.weights.isfinite().all()


@pytest.mark.parametrize("name", ["lamaml", "sync", "cmaml"])
def test_old_task_memory_replays_only_older_tasks_and_live_undoes_that(name, monkeypatch):
    """tasks -> tasks replayed: the first from the live memory, later ones from what was held when they began."""
    replayed = set()
    sample = Reservoir.sample

    def spy(memory, n):
        drawn = sample(memory, n)
        if drawn is not None:
            replayed.update((learning, task) for task in drawn.t.unique().tolist())
        return drawn

    monkeypatch.setattr(Reservoir, "sample", spy)
    for options, expected in (
        ({"use_old_task_memory": True}, {(0, 0), (1, 0), (2, 0), (2, 1)}),
        ({"use_old_task_memory": True, "snapshot": "live"}, {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}),
        ({"use_old_task_memory": False}, {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}),
    ):
        replayed.clear()
        learner = build(name, **options)
        for learning in range(3):
            learner.begin_task(learning)
            for x, _, y in stream(learner.seeds, tasks=1):
                learner.observe(x, learning, y)
        assert replayed == expected, options


@pytest.mark.parametrize("name", ROWS)
def test_learns_a_toy_task_on_cpu(name):
    losses = learn(build(name), tasks=1, batches=30)
    assert losses.shape == (30, 3)
    assert (losses[-5:].mean(0) < 0.5 * losses[:3].mean(0)).all()


@pytest.mark.parametrize("name", ROWS)
def test_packed_equals_solo(name):
    packed = build(name)
    losses = learn(packed)
    for replica, seed in enumerate(packed.seeds):
        solo = build(name, seeds=(seed,))
        torch.testing.assert_close(learn(solo)[:, 0], losses[:, replica], **CLOSE)
        torch.testing.assert_close(solo.weights[0], packed.weights[replica], **CLOSE)
        x, t, _ = next(stream((0,)))
        expected = packed.predict(x.expand(3, -1, -1), t)[replica]
        torch.testing.assert_close(solo.predict(x, t)[0], expected, rtol=1e-3, atol=1e-3)
        if isinstance(memory := getattr(solo, "memory", None), Reservoir):
            for mine, theirs in zip(memory.stored, packed.memory.stored, strict=True):
                torch.testing.assert_close(mine[0], theirs[replica], **EXACT)


@pytest.mark.parametrize("name", ROWS)
def test_replicas_differ_and_the_same_seed_repeats(name):
    first, second = build(name), build(name)
    learn(first), learn(second)
    torch.testing.assert_close(first.weights, second.weights, **EXACT)
    assert not torch.allclose(first.weights[0], first.weights[1])


@pytest.mark.parametrize("name", ROWS)
def test_saved_and_loaded_in_the_middle_it_goes_on_as_if_nothing_had_happened(name):
    learner, other = build(name), build(name)
    batches = list(stream(learner.seeds))
    first, second = ([b for b in batches if b[1] == t] for t in (0, 1))

    def observe(learner, some):
        return [learner.observe(x, t, y) for x, t, y in some]

    learner.begin_task(0)
    observe(learner, first)
    learner.end_task(0)
    learner.begin_task(1)
    observe(learner, second)
    learner.begin_epoch(1)
    observe(learner, second[:3])
    other.predict(second[0][0], 1)  # whatever it may have kept from before must not survive
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one in (learner, other):
        one.losses = observe(one, second[3:])
        one.end_task(1)
        one.begin_task(0)
        one.begin_epoch(0)
        one.losses += observe(one, first)
        one.end_task(0)
    torch.testing.assert_close(torch.stack(learner.losses), torch.stack(other.losses), **EXACT)
    torch.testing.assert_close(learner.weights, other.weights, **EXACT)
    torch.testing.assert_close(learner.predict(first[0][0], 0), other.predict(first[0][0], 0), **EXACT)
    states = io.BytesIO(), io.BytesIO()
    for one, buffer in zip((learner, other), states, strict=True):
        torch.save(one.state_dict(), buffer)
    assert states[0].getvalue() == states[1].getvalue()


@pytest.mark.parametrize("name", ROWS)
def test_a_saved_state_is_not_changed_by_learning_on(name):
    learner = build(name)
    learn(learner)
    saved = learner.state_dict()
    before = io.BytesIO()
    torch.save(saved, before)
    learn(learner)
    after = io.BytesIO()
    torch.save(saved, after)
    assert before.getvalue() == after.getvalue()


@pytest.mark.parametrize("name", ROWS)
def test_an_early_state_brings_the_early_draws_back(name):
    early, learner = build(name), build(name)
    learn(learner)
    learner.load_state_dict(early.state_dict())
    torch.testing.assert_close(learn(learner), learn(early), **EXACT)


@pytest.mark.parametrize("name", ROWS)
def test_state_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match="expected"):
        build(name).load_state_dict(build(name, seeds=(0, 1)).state_dict())


@pytest.mark.parametrize("name", [name for name in ROWS if "n_memories" in ROWS[name]])
def test_state_of_a_memory_of_another_size_is_refused(name):
    learner = build(name)
    learn(learner)
    with pytest.raises(ValueError, match="expected 8"):
        build(name, n_memories=8).load_state_dict(learner.state_dict())


def held(learner):
    """What a learner remembers of each replica: lists of (x, class, task), the task None where it is not kept."""
    found = [[] for _ in learner.seeds]
    parts = []
    memory = getattr(learner, "memory", None)
    if isinstance(memory, Reservoir) and memory.stored is not None:
        parts = [tuple(part[:, : len(memory)] for part in memory.stored)]
    elif isinstance(memory, TaskRings):
        parts = [memory.of(t) for t in memory.rings]
    elif hasattr(learner, "exemplars") and learner.exemplars.y is not None:
        parts = [(learner.exemplars.x, learner.exemplars.y, None)]
    for x, y, t in parts:
        for replica, mine in enumerate(found):
            for cell in (y[replica] >= 0).nonzero().flatten().tolist():
                task = None if t is None else int(t[replica, cell])
                mine.append((tuple(x[replica, cell].tolist()), int(y[replica, cell]), task))
    return found


REMEMBER = [name for name in ROWS if {"memories", "n_memories"} & ROWS[name].keys()]


@pytest.mark.parametrize("name", REMEMBER)
def test_what_is_remembered_was_observed_with_this_class_and_task(name):
    """After every batch, in every replica, no cell twice, and never more than there is room for."""
    learner = build(name)
    observed = [set() for _ in learner.seeds]
    for t in range(2):
        learner.begin_task(t)
        for epoch in range(2):
            learner.begin_epoch(epoch)
            for x, of, y in stream(learner.seeds):
                if of != t:
                    continue
                for mine, xs, ys in zip(observed, x.tolist(), y.tolist(), strict=True):
                    for example, label in zip(xs, ys, strict=True):
                        mine |= {(tuple(example), label, t), (tuple(example), label, None)}
                learner.observe(x, t, y)
                assert all(set(mine) <= seen for mine, seen in zip(held(learner), observed, strict=True))
        learner.end_task(t)
    remembered = held(learner)
    rooms = ROWS[name].get("memories") or 2 * ROWS[name]["n_memories"]
    for mine, seen in zip(remembered, observed, strict=True):
        assert 0 < len(mine) <= rooms and set(mine) <= seen
        assert len(set(mine)) == len(mine) or ROWS[name].get("remember") == "every_epoch"


@pytest.mark.parametrize("name", ROWS)
def test_predicting_changes_nothing(name):
    learner = build(name)
    learn(learner)
    before = io.BytesIO()
    torch.save(learner.state_dict(), before)
    x, t, _ = next(stream(learner.seeds))
    assert learner.predict(x, t).shape == (3, 4, 3)
    if ALGORITHMS[name].needs_task:
        with pytest.raises(ValueError, match="the task must be known"):
            learner.predict(x)
    else:
        assert learner.predict(x).isfinite().all()
    learner.statistics()
    after = io.BytesIO()
    torch.save(learner.state_dict(), after)
    assert before.getvalue() == after.getvalue()


@pytest.mark.parametrize("name", ROWS)
def test_one_diverged_replica_leaves_the_others_alone(name):
    healthy, sick = build(name), build(name)
    sick.weights[1] = torch.nan
    learn(healthy), learn(sick)
    torch.testing.assert_close(healthy.weights[[0, 2]], sick.weights[[0, 2]], **CLOSE)
    assert not sick.weights[1].isfinite().any()


@pytest.mark.parametrize("name", [name for name in ROWS if ALGORITHMS[name].learner.replays])
def test_watching_the_alignment_changes_nothing_learnt(name):
    plain, watched = build(name), build(name)
    watched.watch_alignment()
    learn(plain), learn(watched)
    torch.testing.assert_close(plain.weights, watched.weights, **EXACT)
    cosine = watched.statistics()["gradient_cosine"]
    assert cosine.shape == (3,) and (cosine.abs() <= 1).all()


@pytest.mark.parametrize("name", ROWS)
def test_options_as_published_are_real_options(name):
    algorithm = ALGORITHMS[name]
    fields = {field.name for field in dataclasses.fields(algorithm.options)}
    assert set(algorithm.as_published) <= fields and set(algorithm.presets) <= fields
    losses = learn(build(name, **algorithm.as_published), tasks=2)
    assert losses.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROWS)
def test_cuda_computes_what_the_cpu_computes(name):
    algorithm, cpu = ALGORITHMS[name], build(name)
    gpu = algorithm.learner(cpu.network, cpu.options, cpu.seeds, device="cuda")
    for t in range(2):
        gpu.begin_task(t), cpu.begin_task(t)
        for x, _, y in (batch for batch in stream(cpu.seeds) if batch[1] == t):
            loss = gpu.observe(x.cuda(), t, y.cuda()).cpu()
            torch.testing.assert_close(loss, cpu.observe(x, t, y), rtol=1e-3, atol=1e-4)
        gpu.end_task(t), cpu.end_task(t)
    torch.testing.assert_close(gpu.predict(x.cuda(), 0).cpu(), cpu.predict(x, 0), rtol=1e-2, atol=1e-2)
    gpu.load_state_dict(cpu.state_dict())
    torch.testing.assert_close(gpu.observe(x.cuda(), 1, y.cuda()).cpu(), cpu.observe(x, 1, y), rtol=1e-3, atol=1e-4)
