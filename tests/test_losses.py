"""The loss functions, and with them a whole update against stable-baselines3's SAC."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal, localcontext

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats
from stable_baselines3 import SAC
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from mtrl_imgrad import losses as sac
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.config import Config, NetworkConfig, SacConfig
from mtrl_imgrad.learner import Learner, Noise
from mtrl_imgrad.networks import Actor, Layout, TwinCritic
from mtrl_imgrad.replay import Batch

TASKS, ROWS, ENTRIES, ACTIONS = 3, 32, 5, 2
GAMMA, LR, TAU, WIDTH, DEPTH = 0.97, 3e-3, 0.02, 16, 2


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


# A whole update of one task against stable-baselines3, in float64


class Still(gymnasium.Env):
    """Spaces only; nothing is ever stepped."""

    observation_space = gymnasium.spaces.Box(-10, 10, (ENTRIES,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32)


@dataclass
class Pair:
    """Our learner and theirs with equal weights, and what theirs computes: gradients before each optimiser step."""

    ours: Learner
    theirs: SAC
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    log: dict[str, float] = field(default_factory=dict)

    def linear_layers(self, network: torch.nn.Module) -> list[torch.nn.Linear]:
        return [module for module in network.modules() if isinstance(module, torch.nn.Linear)]

    def vector(self, layout: Layout, members: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        """Pack torch's (weight, bias) pairs, per member and layer, as our flat vector."""
        names = [slot.name.rsplit(".", 1)[0] for slot in layout.slots if slot.name.endswith(".weight")]
        packed = torch.zeros(layout.size, dtype=torch.float64)
        views = layout.views(packed)
        for member, pairs in enumerate(members):
            for name, (weight, bias) in zip(names, pairs, strict=True):
                views[f"{name}.weight"][member] = weight.T
                views[f"{name}.bias"][member] = bias
        return packed

    def pack(self, name: str, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Their actor's or critics' tensors in our order."""
        if name == "actor":  # two heads there, one here: means, then log standard deviations
            *hidden, mean, log_std = pairs
            head = tuple(torch.cat(both) for both in zip(mean, log_std, strict=True))
            return self.vector(self.ours.actor.layout, [[*hidden, head]])
        half = len(pairs) // 2
        return self.vector(self.ours.critic.layout, [pairs[:half], pairs[half:]])

    def weights(self, name: str) -> Tensor:
        network = {"target_critic": self.theirs.critic_target, "critic": self.theirs.critic, "actor": self.theirs.actor}
        return self.pack(name, [(x.weight.data, x.bias.data) for x in self.linear_layers(network[name])])

    def gradient(self, name: str) -> Tensor:
        grads = iter(self.gradients[name])
        return self.pack(name, [(weight, next(grads)) for weight in grads])


def _pair(monkeypatch, epsilon: float) -> Pair:
    network = NetworkConfig(task_input="none", width=WIDTH, depth=DEPTH)
    settings = SacConfig(
        batch_per_task=ROWS, gamma=GAMMA, tau=TAU, actor_lr=LR, critic_lr=LR, temperature_lr=LR,
        initial_temperature=0.5, target_entropy=-2.0,
    )  # fmt: skip
    config = Config(network=network, sac=settings, aggregator=Mean())
    ours = Learner(config, 1, ENTRIES, ACTIONS, torch.device("cpu"), torch.Generator().manual_seed(1))
    ours.critic = TwinCritic(network, 1, ENTRIES, ACTIONS, 1, torch.float64)
    ours.actor = Actor(network, 1, ENTRIES, ACTIONS, torch.float64)
    ours.temperature_mixing = ours.temperature_mixing.double()

    theirs = SAC(
        "MlpPolicy", Still(), policy_kwargs={"net_arch": [WIDTH] * DEPTH}, gamma=GAMMA, tau=TAU, learning_rate=LR,
        ent_coef="auto_0.5", target_entropy=-2.0, seed=1, buffer_size=1,
    )  # fmt: skip
    theirs.policy.double()
    theirs.log_ent_coef.data = torch.full((1,), math.log(0.5), dtype=torch.float64)
    theirs.actor.action_dist.epsilon = epsilon
    # Their actor starts with a standard deviation of one; below that no action comes near |a| = 0.95.
    theirs.actor.log_std.bias.data -= 1.0
    pair = Pair(ours, theirs)
    theirs.set_logger(Logger(None, []))
    monkeypatch.setattr(theirs.logger, "record", lambda key, value, exclude=None: pair.log.update({key: value}))
    # They cast observations to float32.
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda obs, *args, **kwargs: obs)
    optimizers = {"actor": theirs.actor.optimizer, "critic": theirs.critic.optimizer, "alpha": theirs.ent_coef_optimizer}
    for name, optimizer in optimizers.items():

        def keep(optimizer, args, kwargs, name=name):
            pair.gradients[name] = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

        optimizer.register_step_pre_hook(keep)

    ours.state = {name: value.double() for name, value in ours.state.items()}
    for name in ("actor", "critic", "target_critic"):
        ours.state[name] = pair.weights(name)
    ours.state["log_alpha"] = theirs.log_ent_coef.data.clone()
    return pair


def _update_both(pair: Pair, monkeypatch, seed: int) -> dict[str, Tensor]:
    """One update of both from the same batch and noise; our metrics."""
    observations, next_observations = _normal(2, ROWS, ENTRIES, seed=3 * seed)
    random = np.random.default_rng(seed)
    actions = torch.from_numpy(random.uniform(-0.95, 0.95, (ROWS, ACTIONS)))
    rewards, done = _normal(ROWS, seed=3 * seed + 1), torch.from_numpy(random.random(ROWS) < 0.2).double()
    noise = _normal(2, ROWS, ACTIONS, seed=3 * seed + 2).clamp(-2.5, 2.5)

    draws = iter(noise)
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *args, **kwargs: next(draws))
    samples = ReplayBufferSamples(observations, actions, next_observations, done[:, None], rewards[:, None])

    class Buffer:
        def sample(self, batch_size, env=None):
            return samples

    for rows, sample in zip((observations, next_observations), noise, strict=True):
        assert 0.5 < pair.ours.act(rows[None], sample[None]).abs().max() < 0.95
    pair.theirs.replay_buffer = Buffer()
    pair.theirs.train(1, ROWS)
    batch = Batch(
        observations[None], actions[None], rewards[None], next_observations[None], (GAMMA * (1 - done))[None]
    )
    return pair.ours.update(batch, Noise(noise[:, None], None, None)).per_task


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Without their 1e-6 nothing but rounding is left between the two.
@pytest.mark.parametrize(("epsilon", "tolerance"), [(1e-6, 1e-5), (0.0, 1e-10)], ids=["as_published", "without_1e-6"])
def test_losses_and_gradients_equal_stable_baselines3s(epsilon, tolerance, monkeypatch):
    pair = _pair(monkeypatch, epsilon)
    before = pair.ours.state["log_alpha"].exp().clone()
    metrics = _update_both(pair, monkeypatch, seed=1)
    for tag in ("train/ent_coef_loss", "train/critic_loss", "train/actor_loss", "train/ent_coef"):
        assert float(metrics[tag]) == pytest.approx(pair.log[tag], rel=tolerance), tag
    assert metrics["train/ent_coef"].equal(before)  # the value before its step, while the state has moved
    assert not pair.ours.state["log_alpha"].exp().equal(before)
    for name in ("actor", "critic"):  # after one step Adam's first moment is a tenth of the gradient
        assert _relative(pair.ours.state[f"{name}/m"] / 0.1, pair.gradient(name)) < tolerance, name
    assert _relative(pair.ours.state["log_alpha/m"] / 0.1, pair.gradients["alpha"][0]) < tolerance


@pytest.mark.parametrize(("epsilon", "tolerance"), [(1e-6, 1e-4), (0.0, 1e-8)], ids=["as_published", "without_1e-6"])
def test_ten_whole_updates_equal_stable_baselines3s_step_by_step(epsilon, tolerance, monkeypatch):
    pair = _pair(monkeypatch, epsilon)
    start = {name: value.clone() for name, value in pair.ours.state.items()}
    for seed in range(1, 11):
        _update_both(pair, monkeypatch, seed)
        for name in ("actor", "critic", "target_critic"):
            moved = pair.weights(name) - start[name]
            assert _relative(pair.ours.state[name] - start[name], moved) < tolerance, (seed, name)
        theirs = pair.theirs.log_ent_coef.data
        assert _relative(pair.ours.state["log_alpha"] - start["log_alpha"], theirs - start["log_alpha"]) < tolerance
