"""Bayesian gradient descent against its equations, and whole updates of Meta-BGD against naive ones."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.lookahead import LookaheadMAML
from model.meta_bgd import BayesianGradientDescent, MetaBGD, MetaBGDOptions
from tests.naive import NETWORK, SEEDS, batches, clipped, flat, loss_of, taken, tensors, together


def test_without_gradient_nothing_changes():
    mean = torch.randn(2, 6, dtype=torch.float64)
    bgd = BayesianGradientDescent(mean.clone(), 0.05, 3.0)
    for _ in range(4):
        bgd.draw([np.random.default_rng(r) for r in range(2)])
        bgd.add(torch.zeros_like(mean))
    bgd.step()
    assert torch.equal(bgd.mean, mean) and (bgd.sigma == 0.05).all()


def test_a_step_is_the_papers():
    mean, sigma = torch.randn(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64) + 0.1
    bgd = BayesianGradientDescent(mean.clone(), 1.0, 3.0)
    bgd.sigma.copy_(sigma)
    rngs = [np.random.default_rng(r) for r in range(2)]
    gradients, noises = [], []
    for _ in range(5):
        drawn = bgd.draw(rngs)
        noises.append((drawn - mean) / sigma)
        gradients.append(torch.randn_like(mean))
        bgd.add(gradients[-1])
    bgd.step()
    e_g = torch.stack(gradients).mean(dim=0)
    e_ge = torch.stack([g * e for g, e in zip(gradients, noises, strict=True)]).mean(dim=0)
    torch.testing.assert_close(bgd.mean, mean - 3.0 * sigma**2 * e_g)
    expected = sigma * torch.sqrt(1 + (sigma * e_ge / 2) ** 2) - sigma**2 * e_ge / 2
    torch.testing.assert_close(bgd.sigma, expected)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e5])
def test_sigma_stays_positive_in_single_precision(size):
    bgd = BayesianGradientDescent(torch.zeros(1, 200), 0.05, 1.0)
    for step in range(3):
        bgd.draw([np.random.default_rng(step)])
        bgd.add(torch.randn(1, 200) * size)
        bgd.step()
        assert (bgd.sigma > 0).all() and bgd.sigma.isfinite().all()


def test_draws_are_of_the_given_mean_and_deviation():
    bgd = BayesianGradientDescent(torch.full((1, 20_000), 2.0), 0.3, 1.0)
    drawn = bgd.draw([np.random.default_rng(0)])
    assert float(drawn.mean()) == pytest.approx(2, abs=0.01) and float(drawn.std()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("published", [False, True])
def test_updates(published, events, monkeypatch):
    switches = {"bgd_scale": "incoming", "sample_rates": True, "inner_rates": "raw"} if published else {}
    o = MetaBGDOptions(
        glances=2, replay_batch_size=3, inner_steps=2, alpha_init=0.2, std_init=0.3, mean_eta=0.5, train_mc_iters=2,
        grad_clip_norm=0.4, **switches,
    )  # fmt: skip
    learner = MetaBGD(NETWORK, o, SEEDS, dtype=torch.float64)
    orders, noises = [], []
    draw_order, draw = LookaheadMAML._orders, BayesianGradientDescent.draw
    monkeypatch.setattr(LookaheadMAML, "_orders", lambda self, b: orders.append(draw_order(self, b)) or orders[-1])

    def spy(bgd, rngs):
        drawn = draw(bgd, rngs)
        noises.append(bgd._noise)
        return drawn

    monkeypatch.setattr(BayesianGradientDescent, "draw", spy)
    state = [[torch.full_like(w, v) for w, v in ((learner.weights[r], 0.3), (learner.weights[r], 0.3))] for r in (0, 1)]
    means = [[learner.weights[r].clone(), learner.rates[r].clone()] for r in (0, 1)]
    shapes = tensors(learner.weights, 0)

    def parts(vector):
        return [p.view_as(w) for p, w in zip(vector.split([w.numel() for w in shapes]), shapes, strict=True)]

    for x, y in batches():
        learner.observe(x, 0, y)
        replayed, drawn_orders, drawn_noise = taken(events, "sample"), list(orders), list(noises)
        orders.clear(), noises.clear()
        per_draw = len(drawn_noise) // 4
        for glance in range(2):
            for r in (0, 1):
                sums = [[torch.zeros_like(means[r][i]) for _ in range(2)] for i in range(2)]
                for mc in range(2):
                    k = 2 * glance + mc
                    noise = [n[r] for n in drawn_noise[per_draw * k : per_draw * (k + 1)]]
                    theta = (means[r][0] + state[r][0] * noise[0]).requires_grad_()
                    alpha = means[r][1] + state[r][1] * noise[1] if published else means[r][1].clone()
                    alpha.requires_grad_()
                    bx, by = x[r][drawn_orders[k][r]], y[r][drawn_orders[k][r]]
                    meta_x, meta_y = together(replayed[k], r, bx, by)
                    fast, losses = parts(theta), []
                    for part in np.array_split(np.arange(len(by)), 2):
                        inner = torch.autograd.grad(loss_of(fast, bx[part], by[part]), fast, create_graph=True)
                        steps = parts(alpha if published else F.relu(alpha))
                        fast = [w - s * g.clamp(-0.4, 0.4) for w, s, g in zip(fast, steps, inner, strict=True)]
                        losses.append(loss_of(fast, meta_x, meta_y))
                    g_theta, g_alpha = torch.autograd.grad(sum(losses) / 2, (theta, alpha))
                    scale = len(by) if published else len(meta_y)
                    g = [flat(clipped([g_theta], 0.4)) * scale, g_alpha * scale]
                    for i in range(2 if published else 1):
                        sums[i][0] += g[i] / 2
                        sums[i][1] += g[i] * noise[i] / 2
                for i in range(2 if published else 1):
                    sigma, (e_g, e_ge) = state[r][i], sums[i]
                    means[r][i] = (means[r][i] - 0.5 * sigma**2 * e_g).detach()
                    state[r][i] = sigma * torch.sqrt(1 + (sigma * e_ge / 2) ** 2) - sigma**2 * e_ge / 2
    for r in (0, 1):
        torch.testing.assert_close(learner.weights[r], means[r][0])
        torch.testing.assert_close(learner.rates[r], means[r][1])
        torch.testing.assert_close(learner.optimizer.sigma[r], state[r][0])
