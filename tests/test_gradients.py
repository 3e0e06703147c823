"""Gradients and meta-gradients, against autograd, finite differences and closed forms, in float64."""

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.gradients import clip_by_norm_, group_gradients, hessian_product, loss_and_gradient, sgd_chain_
from model.lookahead import look_ahead
from model.networks import MLP, ConvNet, Heads, Network

REPLICAS = 2


class AutogradOnly(Network):
    """The same network, without its written-out gradient."""

    def __init__(self, network):
        self.call, self.layout, self.heads = network.__call__, network.layout, network.heads

    def __call__(self, weights, x):
        return self.call(weights, x)


def tiny(hidden=(4, 3), inputs=3, classes=3):
    network = MLP(inputs, list(hidden), classes)
    rngs = [np.random.default_rng(seed) for seed in range(REPLICAS)]
    return network, network.initial_weights(rngs, torch.float64) + 0.05


def batch(n, inputs=3, classes=3, seed=0):
    torch.manual_seed(seed)
    return Batch.of(torch.randn(REPLICAS, n, inputs, dtype=torch.float64), torch.randint(classes, (REPLICAS, n)), 0)


def convolutional(n=0, seed=0):
    """A network for small images of two tasks, and a batch of n."""
    network = ConvNet((2, 8, 8), 2, 4)
    network.heads = Heads(4, 2, "task")
    network.heads.begin(1)
    rngs = [np.random.default_rng(seed) for seed in range(REPLICAS)]
    torch.manual_seed(seed)
    t = torch.randint(2, (REPLICAS, n))
    examples = Batch(torch.randn(REPLICAS, n, 2, 8, 8, dtype=torch.float64), 2 * t + torch.randint(2, t.shape), t)
    return network, network.initial_weights(rngs, torch.float64) + 0.05, examples


def of_kind(kind, n, seed=0):
    """A network, its weights and a batch of n; kind: hidden units of a perceptron, or "pc_cnn"."""
    return convolutional(n, seed) if kind == "pc_cnn" else (*tiny(kind), batch(n, seed=seed))


KINDS = [(), (4,), (5, 4, 3), "pc_cnn"]


def numeric_gradient(f, point, eps=1e-6):
    """df/dpoint by central differences. f: [replicas, n] -> [replicas], replicas independent."""
    gradient = torch.empty_like(point)
    for i in range(point.shape[1]):
        step = torch.zeros_like(point)
        step[:, i] = eps
        gradient[:, i] = (f(point + step) - f(point - step)) / (2 * eps)
    return gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7])
def test_written_out_gradient_equals_autograd(kind, n):
    network, weights, examples = of_kind(kind, n)
    expected = loss_and_gradient(AutogradOnly(network), weights, examples)
    buffer = torch.full_like(weights, torch.nan)
    for found in (
        loss_and_gradient(network, weights, examples),
        loss_and_gradient(network, weights, examples, out=buffer),
    ):
        torch.testing.assert_close(found, expected)
    assert torch.equal(buffer, found[1])


@pytest.mark.parametrize("kind", [(4, 3), "pc_cnn"])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("shape", [None, (6,), (REPLICAS, 6)])
def test_weighted_and_soft_losses_equal_autograd(shape, soft, kind):
    network, weights, examples = of_kind(kind, 6)
    weighting = None if shape is None else torch.rand(shape, dtype=torch.float64)
    logits = network.to_learn(network(weights, examples.x), examples.t)
    targets = (logits * torch.rand_like(logits)).softmax(dim=2) if soft else None
    found = loss_and_gradient(network, weights, examples, weighting=weighting, targets=targets)
    expected = loss_and_gradient(AutogradOnly(network), weights, examples, weighting=weighting, targets=targets)
    torch.testing.assert_close(found, expected)
    log_p = logits.log_softmax(dim=2)
    goal = torch.nn.functional.one_hot(examples.y, logits.shape[2]) if targets is None else targets
    share = torch.full((6,), 1 / 6) if weighting is None else weighting
    torch.testing.assert_close(found[0], (-(goal * log_p).sum(dim=2) * share).sum(dim=1))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_gradients_of_groups_are_those_of_each_group_alone(groups, fast):
    network, weights = tiny()
    wrapped = network if fast else AutogradOnly(network)
    examples, shares = batch(6), torch.rand(6, dtype=torch.float64)
    found = group_gradients(wrapped, weights, examples, groups)
    weighted = group_gradients(wrapped, weights, examples, groups, shares)
    parts = zip(examples.split(groups), shares.split(6 // groups), strict=True)
    for i, (part, share) in enumerate(parts):
        torch.testing.assert_close(found[:, i], loss_and_gradient(network, weights, part)[1])
        torch.testing.assert_close(weighted[:, i], loss_and_gradient(network, weights, part, weighting=share)[1])


@pytest.mark.parametrize("hidden", [(), (4,), (5, 4, 3)])
def test_products_of_gradients_without_the_gradients(hidden):
    network, weights = tiny(hidden)
    examples, shares, vector = batch(6), torch.rand(6, dtype=torch.float64), torch.randn_like(weights)
    gradients = group_gradients(network, weights, examples, 3, shares)
    products, along = network.group_products(weights, examples, 3, shares, vector)
    torch.testing.assert_close(products, gradients @ gradients.mT)
    torch.testing.assert_close(along, (gradients @ vector[:, :, None])[:, :, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_chain_of_single_steps_equals_the_steps_one_by_one(kind, n, keep, limit):
    network, weights, examples = of_kind(kind, n)
    rates = torch.rand(REPLICAS, n, dtype=torch.float64)
    fast, slow, theta, clipped = weights.clone(), weights.clone(), weights.clone(), 0
    losses = sgd_chain_(network, fast, examples, rates, keep, limit)
    torch.testing.assert_close(sgd_chain_(AutogradOnly(network), slow, examples, rates, keep, limit), losses)
    for i, example in enumerate(examples.split(n)):
        loss, gradient = loss_and_gradient(AutogradOnly(network), theta, example)
        torch.testing.assert_close(losses[:, i], loss)
        norm = gradient.norm(dim=1, keepdim=True)
        clipped += int((norm > limit).sum())
        theta = theta - rates[:, i : i + 1] * gradient * (limit / norm.clamp(min=limit) if limit else 1)
    assert clipped > 0, "the limit is reached"
    for found in (fast, slow):
        torch.testing.assert_close(found, weights + keep * (theta - weights))


def test_a_chain_with_one_rate_for_all_and_with_clipped_gradients():
    network, weights = tiny()
    examples = batch(5)
    one, many, clipped = weights.clone(), weights.clone(), weights.clone()
    sgd_chain_(network, one, examples, torch.tensor(0.3, dtype=torch.float64))
    sgd_chain_(network, many, examples, torch.full((REPLICAS, 5), 0.3, dtype=torch.float64))
    assert torch.equal(one, many)
    sgd_chain_(network, clipped, examples, torch.tensor(0.3, dtype=torch.float64), limit=0.1)
    assert ((clipped - weights).norm(dim=1) <= 5 * 0.3 * 0.1 + 1e-12).all() and not torch.equal(one, clipped)


def test_shared_examples_give_what_examples_of_their_own_give():
    network, weights = tiny()
    x = batch(6).x[:1]
    torch.testing.assert_close(network(weights, x.expand(REPLICAS, -1, -1)), network(weights, x.repeat(REPLICAS, 1, 1)))


def test_autograd_gradient_equals_finite_differences():
    network, weights = tiny()
    examples = batch(5)
    _, gradient = loss_and_gradient(AutogradOnly(network), weights, examples)
    numeric = numeric_gradient(lambda w: network.loss(w, examples), weights)
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_hessian_product_equals_autograd_and_differences_of_gradients(kind, n):
    network, weights, examples = of_kind(kind, n)
    vector, eps = torch.randn_like(weights), 1e-6
    before = weights.clone()
    found = hessian_product(network, weights, examples, vector)
    torch.testing.assert_close(found, hessian_product(AutogradOnly(network), weights, examples, vector))
    ahead, behind = (loss_and_gradient(network, weights + step * vector, examples)[1] for step in (eps, -eps))
    torch.testing.assert_close(found, (ahead - behind) / (2 * eps), rtol=1e-5, atol=1e-8)
    assert torch.equal(weights, before) and found.abs().sum() > 0


def inner_gradients(network, weights, rates, chunks, relu=True):
    """The inner gradients g_1 .. g_K along the path from `weights`."""
    step, theta, found = rates.relu() if relu else rates, weights, []
    for chunk in chunks:
        found.append(loss_and_gradient(AutogradOnly(network), theta, chunk)[1])
        theta = theta - step * found[-1]
    return found


def meta_loss(network, weights, rates, chunks, meta, every_step, frozen=None, relu=True, clamp=torch.inf):
    """The meta-loss, written down naively; `frozen` inner gradients make it the function first order differentiates."""
    step, theta, losses = rates.relu() if relu else rates, weights, []
    for k, chunk in enumerate(chunks):
        gradient = frozen[k] if frozen else loss_and_gradient(AutogradOnly(network), theta, chunk)[1]
        theta = theta - step * gradient.clamp(-clamp, clamp)
        losses.append(network.loss(theta, meta))
    return sum(losses) / len(losses) if every_step else losses[-1]


def some_rates(weights):
    """Rates of both signs, none near zero, where relu has no derivative."""
    torch.manual_seed(1)
    rates = torch.rand_like(weights) * 0.3 + 0.05
    return torch.where(torch.rand_like(rates) < 0.2, -rates, rates)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("at", ["last", "all"])
@pytest.mark.parametrize("inner_rates", ["relu", "raw"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", [(4, 3), "pc_cnn"])
def test_meta_gradients_equal_finite_differences(second_order, at, inner_rates, fast, kind):
    network, weights, examples = of_kind(kind, 3)
    network = network if fast else AutogradOnly(network)
    rates, chunks, relu = some_rates(weights), examples.split(3), inner_rates == "relu"
    meta = of_kind(kind, 6, seed=2)[2]
    loss, by_weights, by_rates = look_ahead(
        network, weights, rates, chunks, meta, second_order=second_order, meta_loss=at, inner_rates=inner_rates
    )
    frozen = None if second_order else inner_gradients(network, weights, rates, chunks, relu)

    def objective(w, a):
        return meta_loss(network, w, a, chunks, meta, at == "all", frozen, relu)

    torch.testing.assert_close(loss, objective(weights, rates))
    torch.testing.assert_close(
        by_weights, numeric_gradient(lambda w: objective(w, rates), weights), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(by_rates, numeric_gradient(lambda a: objective(weights, a), rates), rtol=1e-4, atol=1e-7)


def test_second_order_differentiates_through_the_inner_clamp():
    network, weights = tiny()
    rates, chunks, meta, clamp = some_rates(weights), batch(3).split(3), batch(6, seed=2), 0.2
    inner = torch.stack(inner_gradients(network, weights, rates, chunks)).abs()
    assert (inner > clamp).any() and (inner < clamp).any()
    _, by_weights, by_rates = look_ahead(network, weights, rates, chunks, meta, second_order=True, clamp=clamp)

    def objective(w, a):
        return meta_loss(network, w, a, chunks, meta, True, clamp=clamp)

    torch.testing.assert_close(
        by_weights, numeric_gradient(lambda w: objective(w, rates), weights), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(by_rates, numeric_gradient(lambda a: objective(weights, a), rates), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("at", ["last", "all"])
def test_first_order_closed_forms(at):
    """dL/dtheta = mean_k G_k and dL/dalpha = -mean_k G_k * sum_{i<=k} g_i where alpha > 0; "last": the last term."""
    network, weights = tiny()
    rates, chunks, meta = some_rates(weights), batch(4).split(4), batch(6, seed=2)
    g = inner_gradients(network, weights, rates, chunks)
    thetas = [weights - rates.relu() * sum(g[:k]) for k in range(1, 5)]
    big = [loss_and_gradient(AutogradOnly(network), theta, meta)[1] for theta in thetas]
    terms = [(big[k], -big[k] * sum(g[: k + 1]) * (rates > 0)) for k in range(4)]
    terms = terms if at == "all" else terms[-1:]
    _, by_weights, by_rates = look_ahead(network, weights, rates, chunks, meta, meta_loss=at)
    torch.testing.assert_close(by_weights, sum(t[0] for t in terms) / len(terms))
    torch.testing.assert_close(by_rates, sum(t[1] for t in terms) / len(terms))


def test_with_one_step_the_rates_gradient_is_minus_meta_times_inner():
    network, weights = tiny()
    rates, chunk, meta = torch.full_like(weights, 0.1), batch(3), batch(6, seed=2)
    _, inner = loss_and_gradient(network, weights, chunk)
    _, by_weights, by_rates = look_ahead(network, weights, rates, [chunk], meta)
    torch.testing.assert_close(by_rates, -by_weights * inner)


@pytest.mark.parametrize("second_order", [False, True])
def test_the_inner_clamp_bounds_every_number_of_the_inner_gradient(second_order):
    network, weights = tiny()
    rates, chunk, meta = torch.full_like(weights, 0.1), batch(3), batch(6, seed=2)
    clamp = 0.01
    _, inner = loss_and_gradient(network, weights, chunk)
    assert (inner.abs() > clamp).any()
    loss, *_ = look_ahead(network, weights, rates, [chunk], meta, second_order=second_order, clamp=clamp)
    theta = weights - rates * inner.clamp(-clamp, clamp)
    torch.testing.assert_close(loss, network.loss(theta, meta))


def test_look_ahead_leaves_its_arguments_alone():
    network, weights = tiny()
    rates = some_rates(weights)
    before = weights.clone(), rates.clone()
    for second_order in (False, True):
        look_ahead(network, weights, rates, batch(3).split(3), batch(6), second_order=second_order, clamp=0.1)
    assert torch.equal(weights, before[0]) and torch.equal(rates, before[1]) and not weights.requires_grad


def test_clipping_is_per_replica_and_only_shortens():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.equal(clip_by_norm_(gradient.clone(), 0.0), gradient)
    torch.testing.assert_close(clip_by_norm_(gradient, 2.0), torch.tensor([[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]]))
    torch.testing.assert_close(gradient[0], torch.tensor([1.2, 1.6]))


def test_the_mnist_network_has_the_published_number_of_parameters():
    assert MLP(784, [100, 100], 10).layout.parameters == 89_610


@pytest.mark.parametrize(
    ("init", "std"),
    [("kaiming_normal", (2 / 784) ** 0.5), ("xavier_normal", (2 / 884) ** 0.5), ("xavier_uniform", (2 / 884) ** 0.5)],
)
def test_initial_weights_have_the_right_spread_and_zero_biases(init, std):
    network = MLP(784, [100], 10, init)
    weights = network.initial_weights([np.random.default_rng(0)])
    tensors = network.layout.named(weights)
    assert float(tensors["layer1.weight"].std()) == pytest.approx(std, rel=0.02)
    assert not tensors["layer1.bias"].any() and not tensors["layer2.bias"].any()
    if init == "xavier_uniform":
        assert float(tensors["layer1.weight"].abs().max()) <= (6 / 884) ** 0.5
