"""OML and ANML: episodes, meta-gradients, zaps, what changes where, and the two heads that only count."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.adam import Adam
from model.batch import Batch
from model.episodes import Episode, EpisodeOptions, draw_episode, meta_gradient
from model.finetune import head_loss_and_gradient, scope_loss_and_gradient
from model.lookahead import LookaheadMAML, LookaheadOptions, look_ahead
from model.networks import MLP
from model.networks.blocks import BlockNet, anml_blocks
from model.networks.modulated import modulated
from model.oml import OML, OMLOptions
from model.registry import ALGORITHMS
from model.statistics_heads import StatisticsHead

CLASSES = 6


def network(gate=True):
    plain = BlockNet((1, 28, 28), anml_blocks(4), CLASSES)
    return modulated(plain, 0.5) if gate else plain


def rngs(n):
    return [np.random.default_rng(seed) for seed in range(n)]


def episode(inner=4, outer=0, images=9, replicas=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(replicas, images, 1, 28, 28, dtype=torch.float64, generator=generator)
    return Episode(x, torch.randint(0, CLASSES, (replicas, images), generator=generator), inner, outer)


def pictures():
    """[classes, 20, 1, 28, 28] uint8: of each class a pattern of its own, under noise."""
    generator = torch.Generator().manual_seed(2)
    pattern = torch.rand(CLASSES, 1, 1, 7, 7, generator=generator).repeat_interleave(4, 3).repeat_interleave(4, 4)
    return (170 * pattern + 85 * torch.rand(CLASSES, 20, 1, 28, 28, generator=generator)).to(torch.uint8)


class Background:
    """A stream with nothing but classes for meta-training."""

    background = pictures()

    @staticmethod
    def to_float(x):
        return x.double() / 255


def learner(name="anml", seeds=(0, 1), net=None, **changes):
    algorithm = ALGORITHMS[name]
    options = OMLOptions(
        **{**algorithm.presets, "meta_iterations": 3, "remember_images": 8, "episode_images": 4, **changes}
    )
    net = net or algorithm.network(network(gate=False), 1, options)
    return OML(net, options, seeds, dtype=torch.float64)


# ---------------------------------------------------------------- networks


def test_the_published_network_has_the_published_parameters():
    whole = modulated(BlockNet((1, 28, 28), anml_blocks(256), 1000), 112 / 256)
    columns = [whole.first_column(scope) for scope in ("all", "prediction", "head")]
    assert columns == [0, 2_552_544, 2_552_544 + 1_184_256]
    assert whole.layout.parameters == 6_041_800


def test_gates_of_a_batch_are_those_of_its_images_and_multiply_the_features():
    net = network()
    weights = net.initial_weights(rngs(2), torch.float64)
    x = episode().x
    gates = net.gates(weights, x)
    torch.testing.assert_close(gates, torch.cat([net.gates(weights, x[:, i : i + 1]) for i in range(x.shape[1])], 1))
    part = weights[:, net.first_column("prediction") :]
    features = net.prediction.features(part, x) * gates
    torch.testing.assert_close(net.features(weights, x), features)
    torch.testing.assert_close(net(weights, x), net.prediction.classify(part, features))


def test_a_gate_leaves_the_start_of_the_prediction_network_as_it_is():
    gated, plain = network(), network(gate=False)
    mine = gated.initial_weights(rngs(2))
    assert torch.equal(mine[:, gated.first_column("prediction") :], plain.initial_weights(rngs(2)))
    open_gates = modulated(plain, 0.5, bias=2.0)
    drawn = open_gates.layout.tensors(open_gates.initial_weights(rngs(1)))
    assert (drawn[open_gates.gate_tensors - 1] == 2).all()


@pytest.mark.parametrize("scope", ["head", "prediction", "all"])
@pytest.mark.parametrize("net", [network(), network(gate=False), modulated(MLP(784, [7, 5], CLASSES), 0.5)])
def test_below_and_above_a_scope_make_the_network(net, scope):
    weights = net.initial_weights(rngs(2), torch.float64)
    x = episode().x
    tensors = net.scope_layout(scope).tensors(weights[:, net.first_column(scope) :])
    torch.testing.assert_close(net.above(tensors, x, net.below(weights, x, scope), scope), net(weights, x))


# ---------------------------------------------------------------- meta-gradients


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("outer", [0, 4])
@pytest.mark.parametrize("scope", ["head", "prediction", "all"])
@pytest.mark.parametrize("gate", [False, True])
def test_the_meta_gradient_is_that_of_look_ahead_with_no_rates_outside_the_scope(gate, scope, outer, second_order):
    net, e = network(gate), episode(outer=outer)
    weights = net.initial_weights(rngs(2), torch.float64)
    before = weights.clone()
    loss, gradient = meta_gradient(net, weights, e, 0.1, scope, second_order)
    assert torch.equal(weights, before)  # nothing changes within an episode
    rates = torch.full_like(weights, 0.1)
    rates[:, : net.first_column(scope)] = 0
    chunks = [Batch(e.x[:, k : k + 1], e.y[:, k : k + 1], e.y[:, k : k + 1]) for k in range(e.inner)]
    meta = Batch(e.x[:, outer:], e.y[:, outer:], e.y[:, outer:])
    expected = look_ahead(net, weights, rates, chunks, meta, second_order=second_order, meta_loss="last")
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def meta_loss(net, weights, e, rate, scope):
    """The meta-loss by plain autograd, for one replica; and phi of the last step."""
    phi, first = weights, net.first_column(scope)
    for k in range(e.inner):
        loss = F.cross_entropy(net(phi, e.x[:, k : k + 1])[0], e.y[0, k : k + 1])
        (gradient,) = torch.autograd.grad(loss, phi, create_graph=True)
        step = torch.zeros_like(phi)
        step[:, first:] = gradient[:, first:]
        phi = phi - rate * step
    return F.cross_entropy(net(phi, e.x[:, e.outer :])[0], e.y[0, e.outer :]), phi


@pytest.mark.parametrize("scope", ["head", "prediction", "all"])
def test_second_order_is_the_derivative_by_finite_differences(scope):
    net, e = network(), episode(replicas=1)
    weights = net.initial_weights(rngs(1), torch.float64)
    _, gradient = meta_gradient(net, weights, e, 0.1, scope, True)
    direction = torch.randn(weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = 1e-6
    up, down = (
        meta_loss(net, (weights + sign * h * direction).requires_grad_(), e, 0.1, scope)[0].item() for sign in (1, -1)
    )
    assert float((gradient * direction).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("scope", ["head", "prediction", "all"])
def test_first_order_is_the_gradient_at_the_adapted_weights(scope):
    net, e = network(), episode(replicas=1, outer=4)
    weights = net.initial_weights(rngs(1), torch.float64)
    loss, gradient = meta_gradient(net, weights, e, 0.1, scope, False)
    _, phi = meta_loss(net, weights.clone().requires_grad_(), e, 0.1, scope)
    phi = phi.detach().requires_grad_()
    last = F.cross_entropy(net(phi, e.x[:, e.outer :])[0], e.y[0, e.outer :])
    torch.testing.assert_close(loss[0], last.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(last, phi)[0])


# ---------------------------------------------------------------- episodes


def drawn(**options):
    """An episode of images whose first pixel is their number."""
    images = torch.zeros(CLASSES, 20, 1, 2, 2)
    images[..., 0, 0] = torch.arange(CLASSES * 20.0).view(CLASSES, 20, 1)
    e = draw_episode(images, rngs(3), EpisodeOptions(**options), lambda x: x)
    return e, e.x[..., 0, 0, 0].long()


def test_an_episode_of_anml():
    e, numbers = drawn()
    assert e.x.shape == (3, 84, 1, 2, 2) and (e.inner, e.outer) == (20, 0)
    assert torch.equal(numbers // 20, e.y)
    for row, y in zip(numbers, e.y, strict=True):
        assert (y[:20] == y[0]).all() and len(row[:20].unique()) == 20 and not row[:20].equal(row[:20].sort().values)
        assert len(row[20:].unique()) == 64 and len(y[20:].unique()) > 1
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(drawn()[1], numbers)  # the same seeds, the same episodes


def test_an_episode_of_oml_meets_other_images_outside_and_keeps_halves_apart():
    how = {"episode_classes": 3, "episode_images": 5, "fresh": True}
    e, numbers = drawn(**how, remember_images=15, split_classes=True)
    assert numbers.shape == (3, 45) and (e.inner, e.outer) == (15, 15)
    for row, y in zip(numbers, e.y, strict=True):
        assert y[:15].view(3, 5).eq(y[:15:5, None]).all() and len(y[:15].unique()) == 3
        assert torch.equal(y[15:30], y[:15]) and len(row[:30].unique()) == 30
        assert (y[:30] >= 3).all() and (y[30:] < 3).all()
    e, numbers = drawn(**how, remember_images=0)
    assert numbers.shape == (3, 30) and e.outer == 15


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"episode_images": 21}, "--episode_images 21"),
        ({"episode_images": 11, "fresh": True}, "at most 10"),
    ],
)
def test_episodes_that_cannot_be_drawn_are_refused(change, said, refused):
    flags = " ".join(f"--{name} {'yes' if value is True else value}" for name, value in change.items())
    assert said in refused(f"--model anml --dataset omniglot {flags}")


# ---------------------------------------------------------------- meta-training


def test_a_row_zap_draws_one_row_anew_for_good_and_leaves_the_bias():
    big = learner(net=modulated(BlockNet((1, 28, 28), anml_blocks(256), CLASSES), 0.1), seeds=(0,))
    weight, bias = big.network.layout.tensors(big.weights)[-2:]
    bias.fill_(3)
    before = weight.clone()
    big._redraw([torch.tensor([2])])
    changed = (weight != before).any(dim=2)[0]
    assert changed.tolist() == [False, False, True, False, False, False]
    assert float(weight[0, 2].std()) == pytest.approx((2 / 2304) ** 0.5, rel=0.05)
    assert (bias == 3).all()


@pytest.mark.parametrize("zap", ["none", "row", "head"])
def test_what_meta_training_draws_anew(zap, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "model.oml.meta_gradient", lambda net, weights, e, *rest: (seen.append((weights.clone(), e)), grad(weights))[1]
    )

    def grad(weights):
        return weights.new_zeros(len(weights)), torch.zeros_like(weights)

    one = learner(zap=zap)
    start = one._head_weight.clone()
    one.pretrain(Background, 0)
    weights, e = seen[0]
    changed = (one.network.layout.tensors(weights)[-2] != start).any(dim=2)
    expected = {"none": torch.zeros(2, CLASSES, dtype=torch.bool), "head": torch.ones(2, CLASSES, dtype=torch.bool)}
    rows = F.one_hot(e.y[:, 0], CLASSES).bool()
    assert torch.equal(changed, expected.get(zap, rows))
    assert torch.equal(one._head_weight, one.network.layout.tensors(weights)[-2])  # it stays


@pytest.mark.parametrize("name", ["anml", "oml"])
def test_meta_training_is_adam_on_the_meta_gradient(name):
    one = learner(name, zap="none", seeds=(0,), scope="head", second_order=True)
    weights = one.weights.clone()
    optimiser = torch.optim.Adam([weights], lr=one.options.meta_lr)
    draws = one.random["episodes"]
    other = [np.random.default_rng() for _ in draws]
    for rng, copy in zip(draws, other, strict=True):
        copy.bit_generator.state = rng.bit_generator.state
    for step in range(3):
        e = draw_episode(Background.background, other, one.options, Background.to_float)
        loss, gradient = meta_gradient(one.network, weights, e, one.options.alpha_init, "head", True)
        weights.grad = gradient
        optimiser.step()
        torch.testing.assert_close(one.pretrain(Background, step), loss)
        torch.testing.assert_close(one.weights, weights, rtol=1e-4, atol=1e-6)


def test_meta_training_lowers_the_meta_loss():
    one = learner(zap="none", meta_iterations=60, meta_lr=0.01, alpha_init=0.02, second_order=True)
    losses = torch.stack([one.pretrain(Background, step) for step in range(60)])
    assert (losses[-10:].mean(0) < 0.8 * losses[:10].mean(0)).all()


def test_replicas_meta_train_as_they_would_alone():
    packed, solo = learner(second_order=True), learner(seeds=(1,), second_order=True)
    for step in range(2):
        torch.testing.assert_close(packed.pretrain(Background, step)[1:], solo.pretrain(Background, step))
    torch.testing.assert_close(packed.weights[1:], solo.weights, rtol=1e-3, atol=1e-5)


def test_adam_is_pytorchs_with_a_rate_for_each_row():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 50, generator=generator)
    rows = [torch.nn.Parameter(row.clone()) for row in weights]
    rates = [0.01, 0.1, 0.01]
    optimisers = [torch.optim.Adam([row], lr=rate) for row, rate in zip(rows, rates, strict=True)]
    ours = Adam()
    for _ in range(4):
        gradient = torch.randn(3, 50, generator=generator)
        ours.step_(weights, gradient, rates)
        for row, optimiser, g in zip(rows, optimisers, gradient, strict=True):
            row.grad = g.clone()
            optimiser.step()
    torch.testing.assert_close(weights, torch.stack([row.data for row in rows]))


# ---------------------------------------------------------------- the stream


@pytest.mark.parametrize("finetune", ["head", "prediction", "all"])
def test_fine_tuning_is_adam_on_its_scope_and_nothing_else_changes(finetune):
    one = learner(online="finetune", finetune_scope=finetune, finetune_lr=0.01)
    one.begin_task(0)
    e = episode()
    x, first = e.x, one.network.first_column(finetune)
    weights = one.weights.clone().requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=0.01)
    for i in range(4):
        loss = F.cross_entropy(one.network(weights, x[:, i : i + 1])[:, 0], e.y[:, i], reduction="none")
        (weights.grad,) = torch.autograd.grad(loss.sum(), weights)
        weights.grad[:, :first] = 0
        optimiser.step()
        torch.testing.assert_close(one.observe(x[:, i : i + 1], 0, e.y[:, i : i + 1]), loss.detach())
    torch.testing.assert_close(one.weights, weights.detach(), rtol=1e-3, atol=1e-5)


def test_the_gradient_of_the_head_alone_is_autograds():
    net, e = network(), episode()
    weights = net.initial_weights(rngs(2), torch.float64)
    head, batch = weights[:, net.first_column("head") :], Batch(e.x, e.y, e.y)
    features = net.features(weights, e.x)
    mine, theirs = (
        derive(net, head, batch, features, "head") for derive in (head_loss_and_gradient, scope_loss_and_gradient)
    )
    torch.testing.assert_close(mine, theirs)


def test_the_head_is_drawn_anew_when_the_stream_begins():
    one, kept = learner(online="finetune"), learner(online="finetune", reset_head=False)
    for each in (one, kept):
        each.network.layout.tensors(each.weights)[-1].fill_(1)
        each.before = each.weights.clone()
        each.begin_task(0)
    first = one.network.first_column("head")
    assert torch.equal(one.weights[:, :first], one.before[:, :first])
    assert (one._head_weight != one.network.layout.tensors(one.before)[-2]).all()
    assert (one.network.layout.tensors(one.weights)[-1] == 0).all()
    assert torch.equal(kept.weights, kept.before)
    after = one.weights.clone()
    one.begin_task(1)
    assert torch.equal(one.weights, after)


def test_all_outputs_compete_where_classes_have_no_heads():
    one = learner(online="finetune")
    assert one.predict(episode().x).isfinite().all()
    assert one.predict(episode().x, 3).shape == (2, 9, CLASSES)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("scope", ["prediction", "all"])
def test_without_gate_and_zap_it_is_cmaml_step_for_step(scope, second_order):
    shared = {"memories": 12, "replay_batch_size": 4, "alpha_init": 0.05, "second_order": second_order, "glances": 2}
    net = MLP(784, [8], CLASSES)
    cmaml = LookaheadMAML(net, LookaheadOptions(learn_lr=False, sync_update=True, **shared), (0, 1))
    anml = OML(net, OMLOptions(scope=scope, gate=False, zap="none", **shared), (0, 1))
    for t in range(2):
        for i in range(4):
            e = episode(images=5 + i)
            for each in (cmaml, anml):
                each.loss = each.observe(e.x.float(), t, e.y)
            assert torch.equal(cmaml.loss, anml.loss) and torch.equal(cmaml.weights, anml.weights)


def test_the_gate_follows_the_meta_loss_at_its_own_rate_and_stays_out_of_the_inner_loop(monkeypatch):
    one = learner(zap="none", gate_lr=0.5, opt_wt=0.25, grad_clip_norm=0.0, memories=0, replay_batch_size=0, glances=1)
    e = episode(images=3)
    seen = []

    def spy(*args, **how):
        seen.append((args[2], look_ahead(*args, **how)))
        return seen[-1][1]

    monkeypatch.setattr("model.lookahead.look_ahead", spy)
    before = one.weights.clone()
    one.observe(e.x, 0, e.y)
    (rates, (_, gradient, _)), first = seen[0], one.network.first_column("prediction")
    assert (rates[:, :first] == 0).all() and (rates[:, first:] == one.options.alpha_init).all()
    moved = before - one.weights
    torch.testing.assert_close(moved[:, :first], 0.5 * gradient[:, :first], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved[:, first:], 0.25 * gradient[:, first:], rtol=1e-3, atol=1e-6)
    assert gradient[:, :first].abs().max() > 0


def test_online_a_class_is_zapped_when_it_is_first_met():
    one = learner("oml", zap="row", opt_wt=0.0, memories=0, replay_batch_size=0, glances=1)
    start = one._head_weight.clone()
    x, y = episode(images=2, replicas=2).x, torch.tensor([[1, 1], [4, 2]])
    one.observe(x, 0, y)
    once = one._head_weight.clone()
    assert (once != start).any(dim=2).nonzero().tolist() == [[0, 1], [1, 2], [1, 4]]
    one.observe(x, 0, torch.tensor([[1, 0], [4, 2]]))
    assert (one._head_weight != once).any(dim=2).nonzero().tolist() == [[0, 0]]


# ---------------------------------------------------------------- heads that only count


def clusters(shots=5, units=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, units, generator=generator) * 2
    y = torch.arange(CLASSES - 1).repeat_interleave(shots)  # the last class never comes
    x = centres[y] + torch.randn(len(y), units, generator=generator) * torch.linspace(0.1, 1, units)
    return x[None].double(), y[None]


def test_the_prototype_is_the_nearest_mean_whatever_the_order():
    x, y = clusters()
    head, other = StatisticsHead("prototype", 1.0), StatisticsHead("prototype", 1.0)
    head.add(x, y, CLASSES)
    for i in torch.randperm(y.shape[1], generator=torch.Generator().manual_seed(4)).tolist():
        other.add(x[:, i : i + 1], y[:, i : i + 1], CLASSES)
    query = torch.randn(1, 50, 7, dtype=torch.float64)
    means = torch.stack([x[0, y[0] == c].mean(dim=0) for c in range(CLASSES - 1)])
    expected = torch.cdist(query[0], means).argmin(dim=1)
    for one in (head, other):
        assert torch.equal(one.scores(query, CLASSES)[0].argmax(dim=1), expected)


def test_the_gaussian_head_is_the_log_density_of_students_t():
    x, y = clusters()
    head = StatisticsHead("gaussian", 4.0)
    head.add(x, y, CLASSES)
    query = torch.randn(1, 40, 7, dtype=torch.float64)
    scores = head.scores(query, CLASSES)[0]
    groups = [x[0, y[0] == c] for c in range(CLASSES - 1)]
    within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups) / sum(len(g) - 1 for g in groups)
    expected = []
    for g in groups:
        n = len(g)
        a, b = (4 + n) / 2, (4 * within + ((g - g.mean(0)) ** 2).sum(0)) / 2
        t = torch.distributions.StudentT(2 * a, g.mean(0), (b * (n + 1) / (a * n)).sqrt())
        expected.append(t.log_prob(query[0]).sum(dim=1))
    difference = scores[:, : CLASSES - 1] - torch.stack(expected, dim=1)
    torch.testing.assert_close(difference, difference[:1, :1].expand_as(difference))  # up to one constant
    assert (scores[:, -1] == scores.min()).all()


@pytest.mark.parametrize("kind", ["prototype", "gaussian"])
def test_a_learner_with_such_a_head_tells_the_classes_it_met_and_changes_no_weight(kind):
    one = learner(head=kind, seeds=(0,))
    images = Background.to_float(Background.background)
    before = one.weights.clone()
    for t in range(3):
        one.begin_task(t)
        for image in images[t, :15]:
            assert one.observe(image[None, None], t, torch.tensor([[t]])).shape == (1,)
    assert torch.equal(one.weights, before)
    right = [one.predict(images[None, t, :15]).argmax(2) == t for t in range(3)]
    assert torch.stack(right).float().mean() > 0.9  # of what it learnt


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("name", ["oml", "anml"])
def test_cuda_meta_trains_as_the_cpu(name, second_order):
    cpu = learner(name, second_order=second_order)
    gpu = OML(cpu.network, cpu.options, cpu.seeds, device="cuda", dtype=torch.float64)

    class OnDevice(Background):
        background = Background.background.cuda()

    for step in range(3):
        loss = gpu.pretrain(OnDevice, step).cpu()
        torch.testing.assert_close(loss, cpu.pretrain(Background, step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gpu.weights.cpu(), cpu.weights, rtol=1e-4, atol=1e-6)
