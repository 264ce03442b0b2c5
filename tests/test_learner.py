"""One update: against the same update written with torch.autograd on whole vectors, and its properties one by one."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from mtrl_imgrad import losses as sac
from mtrl_imgrad.aggregators import AGGREGATORS, Mean, PCGrad
from mtrl_imgrad.config import Config, NetworkConfig, SacConfig
from mtrl_imgrad.learner import Learner, Metrics, Noise, adamw
from mtrl_imgrad.networks import Actor, TwinCritic
from mtrl_imgrad.replay import Batch, Replay

TASKS, ROWS, ENTRIES, ACTIONS = 3, 16, 5, 2
CPU = torch.device("cpu")
RULES = pytest.mark.parametrize("rule", [cls() for cls in AGGREGATORS.values()], ids=list(AGGREGATORS))


def _learner(
    network: dict[str, Any] | None = None, tasks: int = TASKS, double: bool = False, rule=None, precision="float32", **of
) -> Learner:
    """A small learner; `of` are fields of SacConfig. In float64 the networks multiply in float64 too."""
    networks = NetworkConfig(**({"width": 12, "depth": 2} | (network or {})))
    settings = SacConfig(**({"batch_per_task": ROWS, "target_entropy": -2.0, "initial_temperature": 0.3} | of))
    config = Config(network=networks, sac=settings, aggregator=rule or Mean(), precision=precision)
    learner = Learner(config, tasks, ENTRIES, ACTIONS, CPU, torch.Generator().manual_seed(1))
    if double:
        outputs = learner.critic_loss.outputs
        learner.critic = TwinCritic(networks, tasks, learner.inputs.size, ACTIONS, outputs, torch.float64)
        learner.actor = Actor(networks, tasks, learner.critic.encoding_size, ACTIONS, torch.float64)
        learner.state = {name: value.double() for name, value in learner.state.items()}
        learner.temperature_mixing = learner.temperature_mixing.double()
    return learner


def _batch(seed: int = 1, tasks: int = TASKS, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*last: int) -> Tensor:
        return torch.randn(tasks, rows, *last, generator=generator, dtype=torch.float64).to(dtype)

    return Batch(draw(ENTRIES), draw(ACTIONS).tanh(), draw(), draw(ENTRIES), 0.97 * (draw() > -1).to(dtype))


def _noise(learner: Learner, seed: int = 1) -> Noise:
    policy, aggregation = (torch.Generator().manual_seed(seed + i) for i in (100, 200))
    noise = learner.draw_noise(policy, aggregation)
    return replace(noise, actions=noise.actions.to(learner.state["actor"].dtype))


def _update(learner: Learner, batch: Batch | None = None, seed: int = 1) -> Metrics:
    dtype = learner.state["actor"].dtype
    return learner.update(batch or _batch(seed, learner.tasks, dtype=dtype), _noise(learner, seed))


def _copy(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.state_dict().items()}


def _changed(before: dict[str, Tensor], learner: Learner) -> set[str]:
    return {name for name, value in learner.state_dict().items() if not value.equal(before[name])}


# The same update with torch's own autograd, optimisers and one loop over tasks


class Reference:
    """Multi-task SAC on parameter leaves with torch.optim.AdamW and the mean of the task losses."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.settings = learner, learner.config.sac
        self.leaves = {name: learner.state[name].clone().requires_grad_() for name in ("critic", "actor", "log_alpha")}
        self.target = learner.state["target_critic"].clone()
        rates = {"critic": "critic_lr", "actor": "actor_lr", "log_alpha": "temperature_lr"}
        self.optimizers = {
            name: torch.optim.AdamW(
                [leaf], lr=getattr(self.settings, rates[name]), eps=self.settings.adam_eps,
                weight_decay=0.0 if name == "log_alpha" else self.settings.weight_decay,
            )
            for name, leaf in self.leaves.items()
        }  # fmt: skip

    def step(self, name: str, loss: Tensor) -> None:
        leaf, bound = self.leaves[name], self.settings.max_grad_norm
        (leaf.grad,) = torch.autograd.grad(loss, leaf)
        if bound and name != "log_alpha":
            leaf.grad *= min(1.0, bound / float(leaf.grad.norm()))
        self.optimizers[name].step()

    def act(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities; no gradient reaches an encoder."""
        encoding = self.learner.critic.encode(self.leaves["critic"].detach(), self.inputs(observations))
        return sac.tanh_gaussian(*self.learner.actor(self.leaves["actor"], encoding), noise)

    def inputs(self, observations: Tensor) -> Tensor:
        return self.learner.inputs(self.learner.statistics, observations)

    def outputs(self, vector: Tensor, observations: Tensor, actions: Tensor) -> Tensor:
        critic = self.learner.critic
        return critic(vector, critic.encode(vector, self.inputs(observations)), actions)

    def critic_losses(self, batch: Batch, noise: Tensor, alpha: Tensor) -> Tensor:
        with torch.no_grad():
            actions, log_prob = self.act(batch.next_observations, noise)
            values = self.learner.critic_loss.values(self.outputs(self.target, batch.next_observations, actions))
            soft_values = values.min(0).values - alpha[:, None] * log_prob
            targets = self.settings.reward_scale * batch.rewards + batch.discounts * soft_values
        outputs = self.outputs(self.leaves["critic"], batch.observations, batch.actions)
        return self.learner.critic_loss.losses(outputs, targets)

    def update(self, batch: Batch, noise: Tensor) -> None:
        log_alpha, settings = self.leaves["log_alpha"], self.settings
        alpha = log_alpha.detach().exp()
        actions, log_prob = self.act(batch.observations, noise[0])
        critic_losses = self.critic_losses(batch, noise[1], alpha)
        self.step("log_alpha", -(log_alpha * (log_prob.detach() + settings.target_entropy).mean(1)).sum())
        self.step("critic", critic_losses.mean())
        outputs = self.outputs(self.leaves["critic"].detach(), batch.observations, actions)
        values = self.learner.critic_loss.values(outputs).min(0).values
        self.step("actor", (alpha[:, None] * log_prob - values).mean(1).mean())
        self.target += settings.tau * (self.leaves["critic"].detach() - self.target)


CASES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "multi_head": {"network": {"kind": "multi_head"}},
    "affine_layer_norm": {"network": {"layer_norm": "affine", "kind": "multi_head"}},
    "shared_encoder": {"network": {"share_encoder": True, "kind": "multi_head", "layer_norm": "affine"}},
    "task_blind_and_normalised": {"network": {"task_input": "none", "observation_normalization": True}},
    "categorical": {"critic_loss": "categorical", "critic_bins": 11, "critic_min": -5.0, "critic_max": 5.0},
    "weight_decay": {"weight_decay": 0.3},
    "clipped": {"max_grad_norm": 0.05, "network": {"kind": "multi_head"}},
    "reward_scale": {"reward_scale": 7.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_five_updates_with_the_mean_equal_plain_autograd(case):
    learner = _learner(double=True, **case)
    learner.observe(_batch(9, dtype=torch.float64).observations)
    start, reference = _copy(learner), Reference(learner)
    for seed in range(5):
        batch, noise = _batch(seed, dtype=torch.float64), _noise(learner, seed)
        learner.update(batch, noise)
        reference.update(batch, noise.actions)
    expected = {name: leaf.detach() for name, leaf in reference.leaves.items()} | {"target_critic": reference.target}
    for name, value in expected.items():
        moved, ours = value - start[name], learner.state[name] - start[name]
        assert float((ours - moved).abs().max() / moved.abs().max()) < 1e-7, name


# Optimiser


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["adam", "adamw"])
def test_adamw_equals_torchs_over_twenty_steps(weight_decay):
    generator = torch.Generator().manual_seed(1)
    leaf = torch.randn(50, generator=generator, dtype=torch.float64).requires_grad_()
    state = {"x": leaf.detach().clone(), "x/m": torch.zeros_like(leaf.detach()), "x/v": torch.zeros_like(leaf.detach())}
    optimizer = torch.optim.AdamW([leaf], lr=1e-2, eps=1e-5, weight_decay=weight_decay)
    for step in range(1, 21):
        leaf.grad = torch.randn(50, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5 - 4)
        optimizer.step()
        count = torch.tensor(float(step), dtype=torch.float64)
        state |= adamw(state, "x", leaf.grad, count, lr=1e-2, eps=1e-5, weight_decay=weight_decay)
        torch.testing.assert_close(state["x"], leaf.detach(), rtol=1e-12, atol=1e-14)


def test_norms_are_clipped_for_actor_and_critics_apart():
    free, clipped = _learner(double=True), _learner(double=True)
    norms = {name: float(_update(free).scalars[f"gradients/{name}/direction_norm"]) for name in ("actor", "critic")}
    small, large = sorted(norms, key=norms.__getitem__)
    bound = math.sqrt(norms[small] * norms[large])
    assert norms[small] < 0.9 * bound
    clipped = _learner(double=True, max_grad_norm=bound)
    _update(clipped)
    # After one step Adam's first moment is a tenth of the gradient.
    assert float(clipped.state[f"{large}/m"].norm()) == pytest.approx(0.1 * bound, rel=1e-9)
    ratio = clipped.state[f"{large}/m"] / free.state[f"{large}/m"]
    torch.testing.assert_close(ratio.nan_to_num(bound / norms[large]), torch.full_like(ratio, bound / norms[large]))
    if small == "critic":  # the actor's gradient goes through the stepped critics, so only these are untouched
        assert clipped.state["critic/m"].equal(free.state["critic/m"])
    else:
        assert float(clipped.state["actor/m"].norm()) < 0.1 * bound


def test_target_critics_move_by_tau_towards_the_new_critics():
    learner = _learner(double=True, tau=0.25)
    old = learner.state["target_critic"].clone()
    _update(learner)
    torch.testing.assert_close(learner.state["target_critic"], 0.75 * old + 0.25 * learner.state["critic"])


def test_reward_scale_is_a_factor_on_every_reward():
    scaled, plain, batch = _learner(reward_scale=3.0), _learner(), _batch()
    _update(scaled, batch)
    _update(plain, replace(batch, rewards=3.0 * batch.rewards))
    assert _changed(_copy(plain), scaled) == set()


# Temperatures


def test_each_temperature_follows_its_own_tasks_entropy():
    learner, batch = _learner(double=True, network={"task_input": "none"}), _batch(dtype=torch.float64)
    metrics = _update(learner, batch)
    gradient = metrics.per_task["train/entropy"] + 2.0  # entropy minus the target of -2
    torch.testing.assert_close(learner.state["log_alpha/m"], 0.1 * gradient)


def test_shared_temperature_stays_one_and_moves_by_the_mean_gradient():
    shared, own = _learner(double=True, shared_temperature=True), _learner(double=True)
    _update(shared)
    _update(own)
    assert own.state["log_alpha/m"].std() > 1e-4
    torch.testing.assert_close(shared.state["log_alpha/m"], own.state["log_alpha/m"].mean().expand(TASKS))
    for seed in range(5):
        _update(shared, seed=seed)
    assert shared.state["log_alpha"].eq(shared.state["log_alpha"][0]).all()
    assert not shared.state["log_alpha"][0].isclose(torch.tensor(0.3, dtype=torch.float64).log())


# The critic's target


def _targets(learner: Learner, batch: Batch) -> Tensor:
    return _update(learner, batch).per_task["train/target_mean"]


def test_next_action_comes_from_the_next_observation():
    batch = _batch()
    other = _batch(2)

    def blind_to_observations() -> Learner:
        """Target critics that see actions only, so that observations matter through the next action alone."""
        learner = _learner(initial_temperature=1e-12)
        views = learner.critic.layout.views(learner.state["target_critic"])
        views["trunk.0.weight"][:, : learner.inputs.size] = 0
        return learner

    base = _targets(blind_to_observations(), batch)
    assert _targets(blind_to_observations(), replace(batch, observations=other.observations)).equal(base)
    moved = _targets(blind_to_observations(), replace(batch, next_observations=other.next_observations))
    assert (moved - base).abs().min() > 1e-5


def test_truncation_bootstraps_from_the_true_final_observation_and_termination_does_not():
    """Task 0 is truncated, task 1 terminates; what the environments show next is not what the target is made of."""
    replay = Replay(10, 2, 1, ENTRIES, ACTIONS, gamma=0.9, n_step=1, device=CPU)
    first, final, restart = (torch.randn(2, 1, ENTRIES, generator=torch.Generator().manual_seed(i)) for i in range(3))
    action, reward, flags = torch.zeros(2, 1, ACTIONS), torch.tensor([[2.0], [3.0]]), torch.tensor([[True], [False]])
    replay.add(first, action, reward, final, ~flags, flags)
    replay.add(restart, action, reward, restart, flags & False, flags & False)
    batch = replay.gather(torch.zeros(2, 2, 1, dtype=torch.int64))

    learner = _learner(tasks=2, batch_per_task=1)
    noise = _noise(learner)
    inputs, state = learner.inputs(learner.statistics, final), learner.state
    next_actions, log_prob = sac.tanh_gaussian(*learner.actor(state["actor"], inputs), noise.actions[1])
    values = learner.critic(state["target_critic"], inputs, next_actions).squeeze(-1).amin(0)
    bootstrap = (values - 0.3 * log_prob).squeeze(1)
    targets = learner.update(batch, noise).per_task["train/target_mean"]
    torch.testing.assert_close(targets, torch.stack([2.0 + 0.9 * bootstrap[0], torch.tensor(3.0)]))
    assert bootstrap[0].abs() > 1e-3


# Aggregation


@RULES
def test_the_step_is_the_combination_of_task_gradients_by_the_logged_weights(rule):
    learner = _learner(double=True, rule=rule, network={"kind": "multi_head"})
    batch, noise = _batch(dtype=torch.float64), _noise(learner)
    reference = Reference(learner)
    losses = reference.critic_losses(batch, noise.actions[1], learner.state["log_alpha"].exp())
    leaf = reference.leaves["critic"]
    J = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses])

    metrics = learner.update(batch, noise)
    weights, shared = metrics.per_task["gradients/critic/weight"], learner.critic.layout.shared_size
    direction = learner.state["critic/m"] / 0.1  # after one step Adam's first moment is a tenth of the gradient
    torch.testing.assert_close(direction[:shared], weights @ J[:, :shared], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(direction[shared:], J[:, shared:].mean(0), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(metrics.per_task["gradients/critic/norm"], J[:, :shared].norm(dim=1))


@RULES
@pytest.mark.parametrize("kind", ["mlp", "multi_head"])
def test_every_rule_trains_the_critics_to_fit_a_fixed_batch(rule, kind):
    learner = _learner(rule=rule, network={"kind": kind}, critic_lr=3e-3, initial_temperature=1e-3)
    batch = replace(_batch(), discounts=torch.zeros(TASKS, ROWS))  # targets are the rewards
    first = _update(learner, batch).per_task["train/critic_loss"]
    for seed in range(150):
        metrics = _update(learner, batch, seed)
    assert all(torch.isfinite(value).all() for value in learner.state.values())
    assert (metrics.per_task["train/critic_loss"] < 0.5 * first).all()


def test_critics_and_actor_have_aggregators_and_noise_of_their_own():
    learner = _learner(rule=PCGrad())
    assert learner.critic_aggregator is not learner.actor_aggregator
    noise = _noise(learner)
    assert noise.critic.shape == noise.actor.shape == (TASKS, TASKS)
    assert not noise.critic.equal(noise.actor)


def test_an_update_makes_two_backward_passes_for_any_number_of_tasks(monkeypatch):
    learner = _learner(tasks=9)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(args) or grad(*args, **kwargs))
    _update(learner)
    assert len(calls) == 2


def test_a_shared_encoder_is_trained_by_the_critic_loss_only():
    """The actor's loss cannot reach it: an actor of other weights, at equal targets, moves it to the same place."""
    first, second = (_learner(network={"share_encoder": True}) for _ in range(2))
    second.state["actor"] += 0.1
    batch = replace(_batch(), discounts=torch.zeros(TASKS, ROWS))
    _update(first, batch)
    _update(second, batch)
    assert first.state["critic"].equal(second.state["critic"])
    assert not first.state["actor/m"].equal(second.state["actor/m"])


# Purity


@RULES
def test_an_update_depends_on_batch_noise_and_state_alone(rule):
    first, second = _learner(rule=rule), _learner(rule=rule)
    for seed in range(3):  # another past
        _update(second, seed=50 + seed)
    second.load_state_dict(_copy(first))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (the global state is what must not be touched)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batch, noise = _batch(), _noise(first)
    given = {name: value.clone() for name, value in vars(batch).items()}
    metrics = first.update(batch, noise)
    assert torch.get_rng_state().equal(before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert all(value.equal(given[name]) for name, value in vars(batch).items())

    torch.manual_seed(2)
    again = second.update(batch, noise)
    assert _changed(_copy(first), second) == set()
    for tag, value in (metrics.per_task | metrics.scalars).items():
        assert value.equal((again.per_task | again.scalars)[tag]), tag


def test_noise_comes_from_the_given_generators_each_from_its_own():
    learner = _learner(rule=PCGrad())

    def draw(policy: int, aggregation: int) -> Noise:
        return learner.draw_noise(*(torch.Generator().manual_seed(seed) for seed in (policy, aggregation)))

    base = draw(1, 2)
    assert draw(3, 2).critic.equal(base.critic)
    assert not draw(3, 2).actions.equal(base.actions)
    assert draw(1, 3).actions.equal(base.actions)
    assert not draw(1, 3).critic.equal(base.critic)


def test_no_graph_is_kept_and_memory_does_not_grow():
    learner = _learner(network={"width": 128}, batch_per_task=128)
    noise, batch = _noise(learner), _batch(rows=128)
    process = psutil.Process()

    def run(updates: int) -> tuple[int, int]:
        for _ in range(updates):
            metrics = learner.update(batch, noise)
        kept = [*learner.state_dict().values(), *metrics.per_task.values(), *metrics.scalars.values()]
        assert not any(x.requires_grad or x.grad_fn is not None for x in kept)
        gc.collect()
        return process.memory_info().rss, sum(isinstance(x, Tensor) for x in gc.get_objects())

    memory, tensors = run(20)
    later_memory, later_tensors = run(200)
    # One update's activations are over a megabyte: a kept graph would add hundreds.
    assert later_memory - memory < 60e6
    assert later_tensors <= tensors


def test_state_round_trip_continues_with_the_same_numbers():
    first, second = _learner(), _learner()
    for seed in range(3):
        _update(first, seed=seed)
    second.load_state_dict(_copy(first))
    for seed in range(3, 6):
        _update(first, seed=seed)
        _update(second, seed=seed)
    assert _changed(_copy(first), second) == set()


def test_state_of_another_network_is_refused():
    with pytest.raises(ValueError, match="checkpoint: its parameters have other names or shapes"):
        _learner().load_state_dict(_learner(network={"width": 13}).state_dict())


# Updates with a number that is not finite


@pytest.mark.parametrize("field", ["rewards", "next_observations", "observations", "actions"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@RULES
def test_a_non_finite_update_changes_nothing_but_the_counters_of_its_task(rule, value, field):
    learner = _learner(rule=rule)
    _update(learner)
    before, batch = _copy(learner), _batch(2)
    getattr(batch, field)[1, 3] = value
    _update(learner, batch, seed=2)
    assert _changed(before, learner) == {"non_finite"}
    counts = learner.non_finite
    assert counts[:, 1].any()
    assert counts[:, [0, 2]].eq(0).all()


def test_training_goes_on_after_a_non_finite_update_as_if_it_had_not_been():
    hurt, well = _learner(), _learner()
    for seed in range(4):
        if seed == 2:
            bad = _batch(99)
            bad.rewards[0, 0] = math.nan
            _update(hurt, bad, seed=99)
        _update(hurt, seed=seed)
        _update(well, seed=seed)
    assert _changed(_copy(well), hurt) == {"non_finite"}
    assert float(hurt.state["updates"]) == 4


def test_a_finite_update_counts_nothing_and_changes_everything():
    learner = _learner()
    before = _copy(learner)
    _update(learner)
    assert _changed(before, learner) == set(before) - {"non_finite", "statistics"}


# Precision, acting, observing


def test_bfloat16_products_stay_close_to_float32():
    network = {"width": 64, "layer_norm": "plain"}
    exact, rough = (_learner(network=network, precision=p) for p in ("float32", "bfloat16"))
    ours, theirs = _update(rough), _update(exact)
    assert all(value.dtype in (torch.float32, torch.float64) for value in rough.state.values())
    for tag in ("train/critic_loss", "train/entropy", "train/target_mean"):
        assert not ours.per_task[tag].equal(theirs.per_task[tag])
        torch.testing.assert_close(ours.per_task[tag], theirs.per_task[tag], rtol=0.03, atol=0.01)
    for name in ("critic/m", "actor/m"):
        assert torch.cosine_similarity(rough.state[name], exact.state[name], dim=0) > 0.99


@pytest.mark.parametrize("share_encoder", [False, True], ids=["separate", "shared_encoder"])
def test_actions_are_the_policys_mean_or_its_sample(share_encoder):
    learner = _learner(network={"share_encoder": share_encoder})
    observations, noise = _batch().observations, _noise(learner).actions[0]
    encoding = learner.critic.encode(learner.state["critic"], learner.inputs(learner.statistics, observations))
    mean, log_std = learner.actor(learner.state["actor"], encoding)
    assert learner.act(observations, None).equal(mean.tanh())
    torch.testing.assert_close(learner.act(observations, noise), torch.tanh(mean + log_std.exp() * noise))
    assert learner.act(observations, 3 * noise).abs().max() < 1


def test_statistics_move_only_where_normalisation_is_asked_for():
    for wanted in (False, True):
        learner = _learner(network={"observation_normalization": wanted})
        learner.observe(_batch().observations)
        assert bool(learner.statistics.any()) == wanted


def test_parameter_counts_are_those_of_the_layers():
    width, size = 12, ENTRIES + TASKS
    trunk = lambda inputs: (inputs + 1) * width + (width + 1) * width  # noqa: E731
    actor, critic = trunk(size), 2 * trunk(size + ACTIONS)
    heads = (width + 1) * (2 * ACTIONS + 2)
    assert _learner().parameter_counts() == (actor + critic + heads, 0)
    assert _learner(network={"kind": "multi_head"}).parameter_counts() == (actor + critic, TASKS * heads)
