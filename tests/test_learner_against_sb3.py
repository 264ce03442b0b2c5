"""A whole update of one task against stable-baselines3's SAC: same weights, batch and noise, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.config import Config, NetworkConfig, SacConfig
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.networks import Actor, Layout, TwinCritic
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.sac_update import Noise

ROWS, ENTRIES, ACTIONS = 32, 5, 2
GAMMA, LR, TAU, WIDTH, DEPTH = 0.97, 3e-3, 0.02, 16, 2


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
            return self.vector(self.ours.sac.actor.layout, [[*hidden, head]])
        half = len(pairs) // 2
        return self.vector(self.ours.sac.critic.layout, [pairs[:half], pairs[half:]])

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
    ours.sac.critic = TwinCritic(network, 1, ENTRIES, ACTIONS, 1, torch.float64)
    ours.sac.actor = Actor(network, 1, ENTRIES, ACTIONS, torch.float64)

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
    optimizers = {
        "actor": theirs.actor.optimizer,
        "critic": theirs.critic.optimizer,
        "alpha": theirs.ent_coef_optimizer,
    }
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
    batch = Batch(observations[None], actions[None], rewards[None], next_observations[None], (GAMMA * (1 - done))[None])
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
