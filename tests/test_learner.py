"""Properties of one update, each by itself; whole updates are in test_learner_against_autograd and _sb3."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from small_learner import (
    ACTIONS,
    CPU,
    ENTRIES,
    ROWS,
    RULES,
    TASKS,
    changed,
    draw_noise,
    random_batch,
    small_learner,
    state_copy,
    update,
)
from torch import Tensor

from mtrl_imgrad import losses as sac
from mtrl_imgrad.aggregators import CAGrad, MoCo, PCGrad
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.replay import Batch, Replay
from mtrl_imgrad.sac_update import Noise, adamw

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


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
    free = small_learner(double=True)
    scalars = update(free).scalars
    norms = {name: float(scalars[f"gradients/{name}/direction_norm"]) for name in ("actor", "critic")}
    below, above = sorted(norms, key=norms.__getitem__)
    bound = math.sqrt(norms[below] * norms[above])
    assert norms[below] < 0.9 * bound
    clipped = small_learner(double=True, max_grad_norm=bound)
    update(clipped)
    # After one step Adam's first moment is a tenth of the gradient. Its first step hardly depends on the gradient's
    # scale, so that the critics which the actor's gradient goes through are nearly the same.
    ratios = {name: clipped.state[f"{name}/m"].norm() / free.state[f"{name}/m"].norm() for name in norms}
    assert float(ratios[below]) == pytest.approx(1, rel=1e-4)
    assert float(ratios[above]) == pytest.approx(bound / norms[above], rel=1e-4)
    assert torch.cosine_similarity(clipped.state[f"{above}/m"], free.state[f"{above}/m"], dim=0) > 1 - 1e-6


def test_target_critics_move_by_tau_towards_the_new_critics():
    learner = small_learner(double=True, tau=0.25)
    old = learner.state["target_critic"].clone()
    update(learner)
    torch.testing.assert_close(learner.state["target_critic"], 0.75 * old + 0.25 * learner.state["critic"])


def test_reward_scale_is_a_factor_on_every_reward():
    scaled, plain, batch = small_learner(reward_scale=3.0), small_learner(), random_batch()
    update(scaled, batch)
    update(plain, replace(batch, rewards=3.0 * batch.rewards))
    assert changed(state_copy(plain), scaled) == set()


@pytest.mark.parametrize("size", ["largest", "rms"])
def test_return_scaling_divides_each_tasks_rewards_by_the_size_of_its_returns(size):
    scaled, plain, batch = small_learner(return_scaling=size, reward_scale=3.0), small_learner(), random_batch()
    seen = torch.tensor([4.0, 0.0, 0.5][:TASKS])  # 0: nothing yet, so nothing is divided
    scaled.observe_rewards(seen[:, None], torch.zeros(TASKS, 1, dtype=torch.bool))
    update(scaled, batch)
    factors = torch.tensor([3 / 4, 3.0, 6.0][:TASKS])
    update(plain, replace(batch, rewards=factors[:, None] * batch.rewards))
    assert changed(state_copy(plain), scaled) == {"returns", "return_size", "return_steps"}


@pytest.mark.parametrize("size", ["largest", "rms"])
def test_the_size_of_returns_is_finite_for_any_reward_that_is_stored(size):
    learner = small_learner(return_scaling=size)
    for reward in (1.0, 3e38, 1.0):
        learner.observe_rewards(torch.full((TASKS, 1), reward), torch.zeros(TASKS, 1, dtype=torch.bool))
    assert learner.state["return_size"].isfinite().all()
    assert (learner.state["return_size"] > 1e38).all()


# Temperatures


def test_no_temperature_falls_below_its_bound():
    """A target entropy far below the policy's lets every temperature fall."""
    free, bounded = (
        small_learner(min_temperature=least, target_entropy=-50.0, temperature_lr=0.1) for least in (0.0, 0.25)
    )
    for seed in range(10):
        for learner in (free, bounded):
            update(learner, seed=seed)
    assert free.state["log_alpha"].exp().max() < 0.2
    torch.testing.assert_close(bounded.state["log_alpha"].exp(), torch.full((TASKS,), 0.25))


def test_a_temperature_above_its_bound_is_not_touched():
    free, bounded = (small_learner(min_temperature=least, target_entropy=5.0) for least in (0.0, 0.25))
    for learner in (free, bounded):
        update(learner)
    assert changed(state_copy(free), bounded) == set()


def test_each_temperature_follows_its_own_tasks_entropy():
    learner, batch = small_learner(double=True, network={"task_input": "none"}), random_batch(dtype=torch.float64)
    metrics = update(learner, batch)
    gradient = metrics.per_task["train/entropy"] + 2.0  # entropy minus the target of -2
    torch.testing.assert_close(learner.state["log_alpha/m"], 0.1 * gradient)


def test_shared_temperature_stays_one_and_moves_by_the_mean_gradient():
    shared, own = small_learner(double=True, shared_temperature=True), small_learner(double=True)
    update(shared)
    update(own)
    assert own.state["log_alpha/m"].std() > 1e-4
    torch.testing.assert_close(shared.state["log_alpha/m"], own.state["log_alpha/m"].mean().expand(TASKS))
    for seed in range(5):
        update(shared, seed=seed)
    assert shared.state["log_alpha"].eq(shared.state["log_alpha"][0]).all()
    assert not shared.state["log_alpha"][0].isclose(torch.tensor(0.3, dtype=torch.float64).log())


# The critic's target


def _targets(learner: Learner, batch: Batch) -> Tensor:
    return update(learner, batch).per_task["train/target_mean"]


def test_next_action_comes_from_the_next_observation():
    batch = random_batch()
    other = random_batch(2)

    def blind_to_observations() -> Learner:
        """Target critics that see actions only, so that observations matter through the next action alone."""
        learner = small_learner(initial_temperature=1e-12)
        views = learner.sac.critic.layout.views(learner.state["target_critic"])
        views["trunk.0.weight"][:, : learner.sac.inputs.size] = 0
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

    learner = small_learner(tasks=2, batch_per_task=1)
    noise = draw_noise(learner)
    inputs, state = learner.sac.inputs(learner.state["statistics"], final), learner.state
    next_actions, log_prob = sac.tanh_gaussian(*learner.sac.actor(state["actor"], inputs), noise.actions[1])
    values = learner.sac.critic(state["target_critic"], inputs, next_actions).squeeze(-1).amin(0)
    bootstrap = (values - 0.3 * log_prob).squeeze(1)
    targets = learner.update(batch, noise).per_task["train/target_mean"]
    torch.testing.assert_close(targets, torch.stack([2.0 + 0.9 * bootstrap[0], torch.tensor(3.0)]))
    assert bootstrap[0].abs() > 1e-3


# Aggregation


@EVERY_RULE
@pytest.mark.parametrize("kind", ["mlp", "multi_head"])
def test_every_rule_trains_the_critics_to_fit_a_fixed_batch(rule, kind):
    learner = small_learner(rule=rule, network={"kind": kind}, critic_lr=3e-3, initial_temperature=1e-3)
    batch = replace(random_batch(), discounts=torch.zeros(TASKS, ROWS))  # targets are the rewards
    first = update(learner, batch).per_task["train/critic_loss"]
    for seed in range(300 if isinstance(rule, MoCo) else 150):  # its gradients and weights are averages of past ones
        metrics = update(learner, batch, seed)
    assert all(torch.isfinite(value).all() for value in learner.state.values())
    assert (metrics.per_task["train/critic_loss"] < 0.5 * first).all()


def test_critics_and_actor_have_noise_of_their_own():
    learner = small_learner(rule=PCGrad())
    noise = draw_noise(learner)
    assert noise.critic.shape == noise.actor.shape == (TASKS, TASKS)
    assert not noise.critic.equal(noise.actor)


def test_each_aggregator_weighs_its_own_network():
    learner = small_learner()
    learner.sac.rules["actor"] = CAGrad(c=0.9)
    weights = {name: update(learner).per_task[f"gradients/{name}/weight"] for name in ("critic", "actor")}
    torch.testing.assert_close(weights["critic"], torch.full((TASKS,), 1 / TASKS, dtype=torch.float64))
    assert weights["actor"].std() > 1e-3


def test_an_update_makes_two_backward_passes_for_any_number_of_tasks(monkeypatch):
    learner = small_learner(tasks=9)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(args) or grad(*args, **kwargs))
    update(learner)
    assert len(calls) == 2


def test_a_shared_encoder_is_trained_by_the_critic_loss_only():
    """The actor's loss cannot reach it: an actor of other weights, at equal targets, moves it to the same place."""
    first, second = (small_learner(network={"share_encoder": True}) for _ in range(2))
    second.state["actor"] += 0.1
    batch = replace(random_batch(), discounts=torch.zeros(TASKS, ROWS))
    update(first, batch)
    update(second, batch)
    assert first.state["critic"].equal(second.state["critic"])
    assert not first.state["actor/m"].equal(second.state["actor/m"])


# Purity


@EVERY_RULE
def test_an_update_depends_on_batch_noise_and_state_alone(rule):
    first, second = small_learner(rule=rule), small_learner(rule=rule)
    for seed in range(3):  # another past
        update(second, seed=50 + seed)
    second.load_state_dict(state_copy(first))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (the global state is what must not be touched)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batch, noise = random_batch(), draw_noise(first)
    given = {name: value.clone() for name, value in vars(batch).items()}
    metrics = first.update(batch, noise)
    assert torch.get_rng_state().equal(before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert all(value.equal(given[name]) for name, value in vars(batch).items())

    torch.manual_seed(2)
    again = second.update(batch, noise)
    assert changed(state_copy(first), second) == set()
    for tag, value in (metrics.per_task | metrics.scalars).items():
        assert value.equal((again.per_task | again.scalars)[tag]), tag


def test_noise_comes_from_the_given_generators_each_from_its_own():
    learner = small_learner(rule=PCGrad())

    def draw(policy: int, aggregation: int) -> Noise:
        return learner.draw_noise(*(torch.Generator().manual_seed(seed) for seed in (policy, aggregation)))

    base = draw(1, 2)
    assert draw(3, 2).critic.equal(base.critic)
    assert not draw(3, 2).actions.equal(base.actions)
    assert draw(1, 3).actions.equal(base.actions)
    assert not draw(1, 3).critic.equal(base.critic)


def test_no_graph_is_kept_and_memory_does_not_grow():
    learner = small_learner(network={"width": 128}, batch_per_task=128)
    noise, batch = draw_noise(learner), random_batch(rows=128)
    process = psutil.Process()

    def run(updates: int) -> tuple[int, int]:
        for _ in range(updates):
            metrics = learner.update(batch, noise)
        kept = [*learner.state_dict().values(), *metrics.per_task.values(), *metrics.scalars.values()]
        assert not any(x.requires_grad or x.grad_fn is not None for x in kept)
        gc.collect()
        return process.memory_info().rss, sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    memory, tensors = run(20)
    later_memory, later_tensors = run(200)
    # One update's activations are over a megabyte: a kept graph would add hundreds.
    assert later_memory - memory < 60e6
    assert later_tensors <= tensors


def test_state_round_trip_continues_with_the_same_numbers():
    first, second = small_learner(), small_learner()
    for seed in range(3):
        update(first, seed=seed)
    second.load_state_dict(state_copy(first))
    for seed in range(3, 6):
        update(first, seed=seed)
        update(second, seed=seed)
    assert changed(state_copy(first), second) == set()


def test_state_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"'actor' is float32 \[355\] and must be float32 \[316\]"):
        small_learner().load_state_dict(small_learner(network={"width": 13}).state_dict())


# Precision, acting, observing


def test_bfloat16_products_stay_close_to_float32():
    network = {"width": 64, "layer_norm": "plain"}
    exact, rough = (small_learner(network=network, precision=p) for p in ("float32", "bfloat16"))
    ours, theirs = update(rough), update(exact)
    assert all(
        value.dtype in (torch.float32, torch.float64) for name, value in rough.state.items() if name != "non_finite"
    )
    for tag in ("train/critic_loss", "train/entropy", "train/target_mean"):
        assert not ours.per_task[tag].equal(theirs.per_task[tag])
        torch.testing.assert_close(ours.per_task[tag], theirs.per_task[tag], rtol=0.03, atol=0.01)
    for name in ("critic/m", "actor/m"):
        assert torch.cosine_similarity(rough.state[name], exact.state[name], dim=0) > 0.99


@pytest.mark.parametrize("share_encoder", [False, True], ids=["separate", "shared_encoder"])
def test_actions_are_the_policys_mean_or_its_sample(share_encoder):
    learner = small_learner(network={"share_encoder": share_encoder})
    observations, noise = random_batch().observations, draw_noise(learner).actions[0]
    encoding = learner.sac.critic.encode(
        learner.state["critic"], learner.sac.inputs(learner.state["statistics"], observations)
    )
    mean, log_std = learner.sac.actor(learner.state["actor"], encoding)
    assert learner.act(observations, None).equal(mean.tanh())
    torch.testing.assert_close(learner.act(observations, noise), torch.tanh(mean + log_std.exp() * noise))
    assert learner.act(observations, 100 * noise).abs().max() <= 1


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_noise_of_exploration_is_standard_normal_with_the_asked_correlation(rho):
    learner, generator = small_learner(noise_correlation=rho), torch.Generator().manual_seed(1)
    white = torch.randn(20_000, TASKS, 1, ACTIONS, generator=generator)
    noise = torch.stack([learner.explore(row).clone() for row in white])[200:]
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.var()) == pytest.approx(1, abs=0.05)
    for lag in (1, 2, 5):
        assert float((noise[lag:] * noise[:-lag]).mean()) == pytest.approx(rho**lag, abs=0.05)
    assert rho or noise.equal(white[200:])


def test_random_starts_last_as_long_as_was_drawn_and_end_with_the_policys_actions():
    learner, most = small_learner(random_start=3), 3
    policys, none = torch.full((TASKS, 1, ACTIONS), 2.0), torch.zeros(TASKS, 1, dtype=torch.bool)
    uniform = torch.tensor([[0.0], [0.5], [0.999]][:TASKS])  # 0, 2 and 3 random decisions
    learner.observe_ends(~none, uniform)
    random = []
    for _ in range(most + 2):
        chosen = learner.start_at_random(policys, torch.randn(TASKS, 1, ACTIONS))
        random.append((chosen != policys).all(-1)[:, 0])
        assert ((chosen == policys) | (chosen.abs() <= 1)).all()
        learner.observe_ends(none, torch.rand(TASKS, 1))  # no episode ends
    assert torch.stack(random).sum(0).tolist() == [0, 2, 3][:TASKS]
    assert torch.stack(random).int().diff(dim=0).max() <= 0, "they come first"


def test_every_number_of_random_decisions_is_as_likely():
    learner = small_learner(random_start=4)
    ended, generator = torch.ones(TASKS, 1, dtype=torch.bool), torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(5000):
        learner.observe_ends(ended, torch.rand(TASKS, 1, generator=generator))
        drawn.append(learner.state["random_left"].clone())
    counts = torch.stack(drawn).flatten().long().bincount()
    torch.testing.assert_close(counts / counts.sum(), torch.full((5,), 0.2), atol=0.02, rtol=0)


def test_random_decisions_are_uniform():
    learner, rows = small_learner(random_start=1), 20_000
    learner.state["random_left"] = torch.ones(TASKS, rows)
    noise = torch.randn(TASKS, rows, ACTIONS, generator=torch.Generator().manual_seed(1))
    chosen = learner.start_at_random(torch.zeros_like(noise), noise)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(chosen.flatten().quantile(quantiles), 2 * quantiles - 1, atol=0.02, rtol=0)


def test_without_random_starts_every_action_is_the_policys():
    learner = small_learner()
    actions, noise = torch.rand(TASKS, 1, ACTIONS), torch.randn(TASKS, 1, ACTIONS)
    learner.observe_ends(torch.ones(TASKS, 1, dtype=torch.bool), torch.full((TASKS, 1), 0.999))
    assert learner.start_at_random(actions, noise).equal(actions)


def test_statistics_move_only_where_normalisation_is_asked_for():
    for wanted in (False, True):
        learner = small_learner(network={"observation_normalization": wanted})
        learner.observe(random_batch().observations)
        assert bool(learner.state["statistics"].any()) == wanted


def test_returns_move_only_where_rewards_are_scaled_by_them():
    for wanted in ("none", "largest", "rms"):
        learner = small_learner(return_scaling=wanted)
        learner.observe_rewards(torch.ones(TASKS, 1), torch.zeros(TASKS, 1, dtype=torch.bool))
        moved = {name for name in ("returns", "return_size", "return_steps") if learner.state[name].any()}
        assert moved == (set() if wanted == "none" else {"returns", "return_size", "return_steps"})


def test_parameter_counts_are_those_of_the_layers():
    width, size = 12, ENTRIES + TASKS
    trunk = lambda inputs: (inputs + 1) * width + (width + 1) * width  # noqa: E731
    actor, critic = trunk(size), 2 * trunk(size + ACTIONS)
    heads = (width + 1) * (2 * ACTIONS + 2)
    assert small_learner().parameter_counts() == (actor + critic + heads, 0)
    assert small_learner(network={"kind": "multi_head"}).parameter_counts() == (actor + critic, TASKS * heads)
