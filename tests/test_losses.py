"""The loss functions against closed forms, torch.distributions, scipy and 60-digit arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy import stats
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from torch import Tensor

from mtrl_imgrad import losses as sac

TASKS, ROWS, ACTIONS = 3, 32, 2


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The policy's log-probability


def test_log_probability_is_that_of_a_transformed_distribution():
    mean, log_std, noise = (_normal(TASKS, ROWS, ACTIONS, seed=seed) for seed in (1, 2, 3))
    log_std = 0.3 * log_std
    actions, log_prob = sac.tanh_gaussian(mean, log_std, noise)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * noise))
    torch.testing.assert_close(log_prob, squashed.log_prob(actions).sum(-1), rtol=1e-8, atol=1e-8)


def _exact_log_probability(u: float) -> float:
    """log density of tanh(u) for u from a standard normal, in 60 digits; 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2."""
    with localcontext() as context:
        context.prec = 60
        x = Decimal(u)
        slope = 4 / (x.exp() + (-x).exp()) ** 2
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
        return float(-x * x / 2 - (2 * pi).ln() / 2 - slope.ln())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("u", [0.0, 0.5, -1.0, 3.0, -6.0, 9.0, -20.0, 40.0])
def test_log_probability_is_exact_where_stable_baselines3_parts_from_it(u, dtype):
    value = torch.full((1, 1, 1), u, dtype=dtype)
    zero = torch.zeros_like(value)
    _, log_prob = sac.tanh_gaussian(zero, zero, value)
    exact = _exact_log_probability(u)
    assert float(log_prob) == pytest.approx(exact, rel=4 * torch.finfo(dtype).eps, abs=4 * torch.finfo(dtype).eps)

    theirs = SquashedDiagGaussianDistribution(1).proba_distribution(zero[0], zero[0])
    difference = abs(float(theirs.log_prob(torch.tanh(value[0]), value[0])) - exact)
    # Their 1e-6 stands beside 1 - a^2 in a logarithm: invisible below |a| = 0.95, wrong by orders of magnitude at 1.
    if abs(math.tanh(u)) < 0.95:
        assert difference < 1.1e-5
    else:
        expected = math.log1p(1e-6 * math.cosh(u) ** 2)
        assert difference == pytest.approx(expected, rel=0.05 if dtype == torch.float64 else 0.3, abs=1e-5)
    assert abs(u) < 9 or difference > 1


def test_log_probability_has_a_finite_gradient_far_in_the_tail():
    mean = torch.full((1, 1, 1), 50.0, requires_grad=True)
    _, log_prob = sac.tanh_gaussian(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    assert float(gradient) == pytest.approx(2.0)  # d/du of 2 u


# One number per task


@pytest.mark.parametrize("name", ["temperature", "actor", "squared", "categorical"])
def test_a_tasks_loss_depends_on_its_own_rows_only(name):
    alpha, log_prob, values = _normal(TASKS).exp(), _normal(TASKS, ROWS), _normal(2, TASKS, ROWS)
    categorical = sac.CategoricalLoss(11, -3, 3)
    losses = {
        "temperature": lambda x: sac.temperature_losses(alpha.log(), log_prob * x, -2.0),
        "actor": lambda x: sac.actor_losses(alpha, log_prob * x, values),
        "squared": lambda x: sac.SquaredLoss().losses(values[..., None] * x[..., None], log_prob),
        "categorical": lambda x: categorical.losses(_normal(2, TASKS, ROWS, 11) * x[..., None], log_prob),
    }[name]
    ones = torch.ones(TASKS, ROWS, dtype=torch.float64)
    changed = ones.clone()
    changed[1, 4] = 3.0
    before, after = losses(ones), losses(changed)
    assert before.shape == (TASKS,)
    assert before[[0, 2]].equal(after[[0, 2]])
    assert before[1] != after[1]


def test_temperature_falls_when_entropy_is_above_its_target():
    log_alpha = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor([3.0, -3.0], dtype=torch.float64)
    losses = sac.temperature_losses(log_alpha, -entropy[:, None].expand(2, ROWS), target_entropy=-1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), log_alpha)
    assert gradient.tolist() == [4.0, -2.0]  # entropy minus its target; descent lowers alpha where it is positive


def test_soft_target_takes_the_lower_twin_and_cuts_at_discount_zero():
    rewards = torch.tensor([[1.0, 1.0]])
    next_values = torch.tensor([[[5.0, 5.0]], [[3.0, 7.0]]])
    target = sac.soft_target(
        rewards, torch.tensor([[0.5, 0.0]]), next_values, torch.full((1, 2), 2.0), torch.tensor([0.25])
    )
    assert target.tolist() == [[1 + 0.5 * (3 - 0.25 * 2), 1.0]]


# The categorical critic

HISTOGRAM = sac.CategoricalLoss(41, -5.0, 15.0)
BIN = 20 / 41


def test_target_histogram_is_that_of_a_truncated_normal():
    targets = torch.linspace(-5, 15, 97, dtype=torch.float64)[None]
    sigma, edges = 0.75 * BIN, np.linspace(-5, 15, 42)
    distribution = HISTOGRAM.target_distribution(targets)[0].numpy()
    for y, histogram in zip(targets[0].tolist(), distribution, strict=True):
        expected = np.diff(stats.truncnorm.cdf(edges, (-5 - y) / sigma, (15 - y) / sigma, loc=y, scale=sigma))
        np.testing.assert_allclose(histogram, expected, atol=1e-12)
    np.testing.assert_allclose(distribution.sum(-1), 1, rtol=1e-12)


def test_values_invert_the_histogram():
    inside = torch.linspace(-5 + 5 * BIN, 15 - 5 * BIN, 83, dtype=torch.float64)
    logits = HISTOGRAM.target_distribution(inside[None]).log().expand(2, -1, -1, -1)
    torch.testing.assert_close(HISTOGRAM.values(logits), inside.expand(2, 1, -1), rtol=0, atol=1e-4 * BIN)


@pytest.mark.parametrize(("beyond", "edge"), [(-1e4, -5.0), (1e4, 15.0)], ids=["below", "above"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_targets_beyond_the_range_are_clipped_to_it(beyond, edge, dtype):
    clipped, at_edge = (HISTOGRAM.target_distribution(torch.full((1, 1), y, dtype=dtype)) for y in (beyond, edge))
    assert clipped.equal(at_edge)
    assert float(clipped.sum()) == pytest.approx(1, abs=1e-6)


def test_categorical_loss_is_least_at_the_targets_own_histogram():
    targets = 10 * torch.rand(TASKS, ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    histogram = HISTOGRAM.target_distribution(targets)
    logits = histogram.clamp(min=1e-30).log().expand(2, -1, -1, -1).clone().requires_grad_()
    least = HISTOGRAM.losses(logits, targets)
    entropy = torch.distributions.Categorical(probs=histogram).entropy().mean(1)
    torch.testing.assert_close(least, 2 * entropy)  # two critics
    (gradient,) = torch.autograd.grad(least.sum(), logits)
    assert gradient.abs().max() < 1e-12
    for seed in range(20):
        assert (HISTOGRAM.losses(logits + 0.1 * _normal(2, TASKS, ROWS, 41, seed=seed), targets) > least).all()


def test_squared_loss_is_half_the_sum_of_both_critics_mean_squared_errors():
    outputs, targets = _normal(2, TASKS, ROWS, 1), _normal(TASKS, ROWS, seed=2)
    expected = [
        sum(0.5 * torch.nn.functional.mse_loss(outputs[i, k, :, 0], targets[k]) for i in range(2)) for k in range(TASKS)
    ]
    torch.testing.assert_close(sac.SquaredLoss().losses(outputs, targets), torch.stack(expected))
