"""Networks with parts of their own for every task: what is shared, what is not, and the updates."""

import pytest
import torch

from model.networks import MLP, Heads
from model.per_task import (
    Independent,
    IndependentOptions,
    TaskInput,
    TaskInputOptions,
    independent_network,
    taskinput_network,
)
from tests.naive import SEEDS, batches

MNIST = MLP(784, [100, 100], 10)


def build(learner, network, options, n_tasks=3):
    return learner(network(MLP(4, [6], 3), n_tasks), options(lr=0.2), SEEDS, dtype=torch.float64)


def learn(learner, t):
    learner.begin_task(t)
    for x, y in batches():
        learner.observe(x, t, y)


def test_sizes_are_the_published_ones():
    assert taskinput_network(MNIST, 20).layout.parameters == 1_581_110
    assert independent_network(MNIST, 20).layout.parameters == 20 * 4_015
    assert independent_network(MNIST, 100).one.widths == [784, 1, 1, 10]


@pytest.mark.parametrize("finetune", [True, False])
def test_independent_tasks_share_nothing(finetune):
    learner = build(Independent, independent_network, lambda lr: IndependentOptions(lr=lr, finetune=finetune))
    own = [learner.network.parts(learner.weights, t)[0] for t in range(3)]
    assert sum(part.shape[1] for part in own) == learner.weights.shape[1]
    assert not torch.equal(own[0], own[1])
    for t in range(3):
        others = [part.clone() for k, part in enumerate(own) if k != t]
        learner.begin_task(t)
        if t and finetune:
            assert torch.equal(own[t], own[t - 1])
        before = own[t].clone()
        learn(learner, t) if not finetune else [learner.observe(x, t, y) for x, y in batches()]
        assert not torch.equal(before, own[t])
        assert all(torch.equal(a, b) for a, b in zip(others, [p for k, p in enumerate(own) if k != t], strict=True))


def test_task_input_shares_all_but_the_first_layer():
    learner = build(TaskInput, taskinput_network, TaskInputOptions)
    x, _ = next(batches())
    learn(learner, 0)
    before = [learner.network.parts(learner.weights, t)[0].clone() for t in range(3)]
    _, shared = (part.clone() for part in learner.network.parts(learner.weights, 0))
    learn(learner, 1)
    after = [learner.network.parts(learner.weights, t)[0] for t in range(3)]
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])
    assert not torch.equal(shared, learner.network.parts(learner.weights, 0)[1])
    assert not torch.equal(learner.predict(x, 0), learner.predict(x, 1))


@pytest.mark.parametrize(
    ("learner", "network", "options"),
    [(TaskInput, taskinput_network, TaskInputOptions), (Independent, independent_network, IndependentOptions)],
)
def test_updates_are_autograds(learner, network, options):
    learner = build(learner, network, options)
    named = {name: tensor.clone().requires_grad_() for name, tensor in learner.named_parameters().items()}

    def tensor(t, name):
        return named[f"task{t}.{name}"] if f"task{t}.{name}" in named else named[name]

    for t in (0, 2, 1):
        for x, y in batches():
            learner.observe(x, t, y)
            w1, b1, w2, b2 = (tensor(t, f"layer{i}.{kind}") for i in (1, 2) for kind in ("weight", "bias"))
            loss = 0
            for r in range(len(SEEDS)):
                logits = (x[r] @ w1[r].T + b1[r]).relu() @ w2[r].T + b2[r]
                loss = loss + torch.nn.functional.cross_entropy(logits, y[r])
            gradients = torch.autograd.grad(loss, (w1, b1, w2, b2))
            with torch.no_grad():
                for w, g in zip((w1, b1, w2, b2), gradients, strict=True):
                    w -= 0.2 * g
    for name, expected in learner.named_parameters().items():
        torch.testing.assert_close(expected, named[name].detach())


@pytest.mark.parametrize(
    ("learner", "network", "options"),
    [(TaskInput, taskinput_network, TaskInputOptions), (Independent, independent_network, IndependentOptions)],
)
def test_where_the_task_is_not_told_each_class_is_scored_by_its_own_tasks_network(learner, network, options):
    one = MLP(4, [6], 6)
    one.heads = Heads(6, 2, "task")
    learner = learner(network(one, 3), options(lr=0.2), SEEDS, dtype=torch.float64)
    x, _ = next(batches())
    for t in range(2):
        learner.see_task(t)
        learner.begin_task(t)
        learner.observe(x, t, torch.full(x.shape[:2], 2 * t))
    untold = learner.predict(x)
    for t in range(2):
        own = slice(2 * t, 2 * t + 2)
        assert torch.equal(untold[:, :, own], learner.predict(x, t)[:, :, own])
    assert (untold[:, :, 4:] == Heads.OUT).all(), "not seen yet"


def test_a_batch_of_several_tasks_is_refused():
    learner = build(TaskInput, taskinput_network, TaskInputOptions)
    x, y = next(batches())
    with pytest.raises(ValueError, match="the task must be known"):
        learner.observe(x, torch.zeros_like(y), y)
