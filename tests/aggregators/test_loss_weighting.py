"""Rules that weigh losses: each equals a loop with torch's own Adam and autograd, call after call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from gradient_families import FAMILIES, direction, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import by_dwa, by_famo, by_gradnorm, by_uncertainty
from torch import Tensor

from mtrl_imgrad.aggregators import DWA, FAMO, RLW, Aggregator, GradNorm, UncertaintyWeighting

TASKS = (1, 2, 3, 10, 50)
SCALES = (1e-4, 1.0, 1e4)
LEARNED: dict[str, Aggregator] = {
    "uw": UncertaintyWeighting(),
    "dwa": DWA(window=3),
    "gradnorm": GradNorm(w_lr=0.02),
    "famo": FAMO(),
    "famo-official_rl": FAMO(variant="official_rl"),
}
few = settings(max_examples=20, deadline=None, derandomize=True)


def loss_course(num_tasks: int, calls: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Losses [calls, tasks] that fall at different rates, with noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(calls, num_tasks, generator=generator, dtype=torch.float64) + 0.2
    rates = torch.linspace(0.0, 0.1, num_tasks, dtype=torch.float64)
    return scale * noise * torch.exp(-rates * torch.arange(calls, dtype=torch.float64)[:, None])


def step(rule: Aggregator, losses: Tensor, new_losses: Tensor, gramian: Tensor | None = None) -> Tensor:
    """One call of the object, and what it learns from the losses after the step."""
    gramian = torch.eye(losses.shape[-1]) if gramian is None else gramian
    weights = rule(gramian, losses=losses).weights
    if rule.sees_new_losses:
        rule.load_state_dict(rule.after_step(rule.state_dict(), losses, new_losses))
    return weights


def weights_over_time(rule: Aggregator, course: Tensor, gramians: Tensor | None = None) -> Tensor:
    rule.reset()
    given = [None] * (len(course) - 1) if gramians is None else gramians
    pairs = zip(course[:-1], course[1:], given, strict=True)
    return torch.stack([step(rule, old, new, gramian) for old, new, gramian in pairs])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_tasks", TASKS)
def test_uncertainty_weighting_is_kendalls_objective_with_adam(num_tasks: int, scale: float) -> None:
    course = loss_course(num_tasks, 40, scale)
    rule = UncertaintyWeighting(w_lr=0.1)
    torch.testing.assert_close(weights_over_time(rule, course), by_uncertainty(course, rule), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_tasks", TASKS)
def test_famo_is_algorithm_1_with_adam(num_tasks: int, scale: float) -> None:
    course = loss_course(num_tasks, 30, scale)
    for variant in ("paper", "official_rl"):
        rule = FAMO(variant=variant, gamma=0.03, w_lr=0.1)
        torch.testing.assert_close(weights_over_time(rule, course), by_famo(course, rule), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradnorm_is_equation_2_with_adam(family: str, num_tasks: int) -> None:
    course = loss_course(num_tasks, 13)
    jacobians = torch.stack([gradients(family, num_tasks, seed) for seed in range(12)])
    gramians = jacobians @ jacobians.mT
    rule = GradNorm(alpha=0.7, w_lr=0.05)
    expected = by_gradnorm(gramians, course, rule)
    for scale in SCALES:
        given_weights = weights_over_time(rule, course, gramians * scale**2)
        torch.testing.assert_close(given_weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_tasks", TASKS)
def test_dwa_is_the_ratio_of_two_windows(num_tasks: int, scale: float) -> None:
    course = loss_course(num_tasks, 21, scale)
    rule = DWA(window=4, temperature=0.5)
    torch.testing.assert_close(weights_over_time(rule, course), by_dwa(course, rule), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_tasks", TASKS)
def test_rlw_is_a_softmax_of_its_noise(num_tasks: int) -> None:
    noise = RLW().draw_noise(num_tasks, torch.Generator().manual_seed(4))
    exponents = np.exp(noise.numpy())
    expected = exponents / exponents.sum()
    for family, scale in itertools.product(FAMILIES, SCALES):
        jacobian = scale * gradients(family, num_tasks)
        np.testing.assert_allclose(RLW()(jacobian @ jacobian.mT, noise).weights.numpy(), expected, rtol=1e-12)


def test_rlw_weighs_all_tasks_alike_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([RLW().draw_noise(5, generator) for _ in range(4000)])
    weights = RLW()(torch.eye(5).expand(4000, 5, 5), noise).weights
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4000, dtype=torch.float64))
    assert (weights.mean(0) - 0.2).abs().max() < 5 * weights.std() / math.sqrt(4000)


def test_rlw_refuses_noise_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"noise: got \(2,\), need \[..., 3\] as drawn by RLW.draw_noise"):
        RLW()(torch.eye(3), torch.zeros(2))


# Identities


@pytest.mark.parametrize("name", LEARNED)
@few
@given(num_tasks=st.integers(1, 8), seed=st.integers(0, 1000), family=st.sampled_from(FAMILIES), data=st.data())
def test_permuting_the_tasks_permutes_the_weights(name: str, num_tasks: int, seed: int, family: str, data) -> None:
    order = torch.tensor(data.draw(st.permutations(range(num_tasks))))
    course = loss_course(num_tasks, 9, seed=seed)
    jacobians = torch.stack([gradients(family, num_tasks, seed + call) for call in range(8)])
    gramians = jacobians @ jacobians.mT
    expected = weights_over_time(LEARNED[name], course, gramians)[:, order]
    permuted = weights_over_time(LEARNED[name], course[:, order], gramians[:, order][:, :, order])
    torch.testing.assert_close(permuted, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_of_the_gradients_does_not_matter(name: str, scale: float) -> None:
    """For given losses, the direction is linear in the gradients."""
    course, gramians = loss_course(4, 9), torch.stack([gradients("imbalanced", 4, seed) for seed in range(8)])
    gramians = gramians @ gramians.mT
    expected = weights_over_time(LEARNED[name], course, gramians)
    torch.testing.assert_close(weights_over_time(LEARNED[name], course, gramians * scale**2), expected)


@pytest.mark.parametrize("name", ["dwa", "gradnorm", "famo"])
def test_a_factor_on_all_losses_changes_no_weight(name: str) -> None:
    course = loss_course(4, 12)
    expected = weights_over_time(LEARNED[name], course)
    torch.testing.assert_close(weights_over_time(LEARNED[name], 1000 * course), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["dwa", "gradnorm"])
def test_a_factor_on_one_tasks_losses_changes_no_weight(name: str) -> None:
    course = loss_course(4, 12)
    expected = weights_over_time(LEARNED[name], course)
    factors = torch.tensor([1.0, 1e-3, 1e3, 5.0], dtype=torch.float64)
    torch.testing.assert_close(weights_over_time(LEARNED[name], factors * course), expected)


def test_official_famo_divides_by_the_square_of_a_factor_on_the_losses() -> None:
    losses, rule = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64), FAMO(variant="official_rl")
    rule.reset()
    expected = rule(torch.eye(3), losses=losses).weights / 100
    torch.testing.assert_close(rule(torch.eye(3), losses=10 * losses).weights, expected, rtol=1e-6, atol=0)
    paper = FAMO()(torch.eye(3), losses=losses).weights
    total = (1 / 3 / (losses + 1e-8)).sum()
    torch.testing.assert_close(rule(torch.eye(3), losses=losses).weights, paper * total**2)


def test_famo_starts_with_weights_inverse_to_the_losses() -> None:
    losses = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)
    weights = FAMO()(torch.eye(3), losses=losses).weights
    torch.testing.assert_close(weights * losses, (weights * losses)[:1].expand(3), rtol=1e-6, atol=0)
    assert weights.sum().item() == pytest.approx(1.0)


def test_famo_gives_less_to_the_task_whose_loss_fell_more() -> None:
    rule = FAMO()
    state = rule.initial_state((2,), 0)
    state = rule.after_step(state, torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.9]))
    assert state["logits"][0] < state["logits"][1]


def test_equal_relative_falls_leave_famo_only_its_decay() -> None:
    old = torch.tensor([1e4, 3e5, 2e3], dtype=torch.float64)
    state = FAMO().initial_state((3,), 0)
    still = FAMO(gamma=0.0).after_step(state, old, 0.5 * old)
    assert still["logits"].abs().max() < 1e-4  # Adam enlarges what the 1e-8 on the losses leaves
    pulled = state | {"logits": torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)}
    decayed = FAMO(gamma=1.0).after_step(pulled, old, 0.5 * old)["logits"]
    assert decayed[0] < 1.0
    assert decayed[1] > -1.0


def test_uncertainty_weighting_comes_to_rest_at_the_logarithm_of_the_loss() -> None:
    losses, rule = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64), UncertaintyWeighting(w_lr=0.01)
    at_rest = rule.initial_state((3,), 0) | {"log_variance": losses.log()}
    result = rule.aggregate(torch.eye(3), losses=losses, state=at_rest)
    torch.testing.assert_close(result.weights, 1 / (3 * losses))
    assert (result.state["log_variance"] - losses.log()).abs().max() < 1e-8
    for _ in range(2500):
        weights = rule(torch.eye(3), losses=losses).weights
    torch.testing.assert_close(weights, 1 / (3 * losses), rtol=1e-3, atol=0)


def test_a_loss_of_0_leaves_its_variance_as_it_is() -> None:
    rule = UncertaintyWeighting()
    for _ in range(5):
        result = rule(torch.eye(2), losses=torch.tensor([0.0, 2.0]))
    assert result.state["log_variance"][0] == 0
    assert result.state["log_variance"][1] > 0


def test_equal_norms_and_rates_leave_gradnorm_uniform() -> None:
    rule = GradNorm(w_lr=0.1)
    course = loss_course(1, 9).expand(-1, 5) * torch.tensor([1.0, 3.0, 0.1, 7.0, 1e4], dtype=torch.float64)
    weights = weights_over_time(rule, course)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_tasks", TASKS)
def test_norms_that_are_equal_but_for_rounding_leave_gradnorm_uniform(num_tasks: int) -> None:
    rows = gradients("gauss", num_tasks)
    rows = rows / rows.norm(dim=1, keepdim=True)
    course = loss_course(1, 5).expand(-1, num_tasks) * torch.linspace(0.3, 7.0, num_tasks, dtype=torch.float64)
    weights = weights_over_time(GradNorm(w_lr=0.1), course, (rows @ rows.mT).expand(4, -1, -1))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / num_tasks), rtol=1e-12, atol=0)


def test_gradnorm_brings_the_norms_together_and_helps_the_slow_task() -> None:
    jacobian = torch.diag(torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64))
    gramian = jacobian @ jacobian.mT
    equal = torch.ones(3, dtype=torch.float64)
    rule = GradNorm(w_lr=0.01)
    for _ in range(1500):
        weights = rule(gramian, losses=equal).weights
    scaled = weights * jacobian.diagonal()
    assert scaled.max() / scaled.min() < 1.1
    rule = GradNorm(w_lr=0.01, alpha=1.0)
    rule(torch.eye(3), losses=equal)
    for _ in range(50):
        weights = rule(torch.eye(3), losses=torch.tensor([0.2, 1.0, 0.2])).weights
    assert weights[1] > weights[0]


def test_gradnorm_leaves_a_task_without_gradient_out() -> None:
    """The others' weights, as shares of what is theirs, are those without it."""
    jacobian = gradients("imbalanced", 3)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    course = loss_course(4, 9)
    alone = weights_over_time(GradNorm(w_lr=0.05), course[:, :3], (jacobian @ jacobian.mT).expand(8, 3, 3))
    given_weights = weights_over_time(GradNorm(w_lr=0.05), course, (extended @ extended.mT).expand(8, 4, 4))
    assert (given_weights[:, 3] == 0).all()
    shares = given_weights[:, :3] / given_weights[:, :3].sum(-1, keepdim=True)
    torch.testing.assert_close(shares, alone, rtol=1e-7, atol=0)


def test_dwa_is_uniform_until_both_windows_are_full_and_for_a_high_temperature() -> None:
    course = loss_course(3, 12)
    weights = weights_over_time(DWA(window=4), course)
    assert (weights[:7] == 1 / 3).all()
    assert (weights[7:].std(-1) > 1e-3).all()
    assert (weights_over_time(DWA(window=4, temperature=1e6), course) - 1 / 3).abs().max() < 1e-5


def test_dwa_takes_a_vanished_loss_for_one_that_stands_still() -> None:
    course = torch.ones(8, 3, dtype=torch.float64)
    course[:, 1] = 0.0
    course[4:, 2] = 0.5
    weights = weights_over_time(DWA(window=2), course)
    assert weights[3:].isfinite().all()
    assert (weights[3:, 0] == weights[3:, 1]).all()
    assert weights[4, 2] < weights[4, 0]


@pytest.mark.parametrize("num_tasks", [1, 3, 10])
@pytest.mark.parametrize("name", LEARNED)
def test_identical_gradients_with_one_loss_keep_their_direction(name: str, num_tasks: int) -> None:
    """On the mean scale, times exp(-s) for UW (here s = 0) and c^2 = L^-2 for the official form of FAMO."""
    rule, gradient = LEARNED[name], gradients("gauss", 4)[0]
    rule.reset()
    jacobian, losses = gradient.expand(num_tasks, -1), torch.full((num_tasks,), 0.5)
    weights = rule(jacobian @ jacobian.mT, losses=losses).weights
    constant = 4.0 if name == "famo-official_rl" else 1.0
    torch.testing.assert_close(weights @ jacobian, constant * gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*LEARNED, "rlw"])
def test_hard_gramians_have_finite_weights(name: str) -> None:
    rule = RLW() if name == "rlw" else LEARNED[name]
    rows = gradients("shared", 3)
    cases = {
        "one row is zero": rows * torch.tensor([1.0, 0.0, 1.0])[:, None],
        "one is a million times larger": rows * torch.tensor([1.0, 1e6, 1.0])[:, None],
        "opposed": torch.stack([rows[0], -rows[0], rows[1]]),
        "all zero": 0 * rows,
    }
    for label, jacobian in cases.items():
        rule.reset()
        course = loss_course(3, 6)
        weights = weights_over_time(rule, course, (jacobian @ jacobian.mT).expand(5, 3, 3))
        assert weights.isfinite().all(), label
        if "zero" in label:
            assert (weights[:, 1] == 0).all()
        else:
            assert (weights > 0).all()


# The interface


@pytest.mark.parametrize("name", LEARNED)
def test_own_parameters_get_the_weights_too(name: str) -> None:
    jacobian = gradients("gauss", 3)
    jacobian[1] = 0
    rule = LEARNED[name]
    rule.reset()
    result = rule(jacobian @ jacobian.mT, losses=torch.tensor([0.3, 0.4, 2.0]))
    assert torch.equal(result.own_weights[[0, 2]], result.weights[[0, 2]])
    assert result.weights[1] == 0
    assert result.own_weights[1] > 0


@pytest.mark.parametrize("name", LEARNED)
def test_a_batch_is_the_same_as_a_loop(name: str) -> None:
    rule = LEARNED[name]
    courses = torch.stack([loss_course(3, 9, seed=seed) for seed in range(4)])
    jacobians = torch.stack([gradients("conflict", 3, seed) for seed in range(4)])
    gramians = (jacobians @ jacobians.mT).reshape(2, 2, 3, 3)
    batch = courses.reshape(2, 2, 9, 3).movedim(2, 0)
    together = weights_over_time(rule, batch, gramians.expand(8, 2, 2, 3, 3))
    for index in range(4):
        alone = weights_over_time(rule, courses[index], gramians[index // 2, index % 2].expand(8, 3, 3))
        torch.testing.assert_close(together[:, index // 2, index % 2], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LEARNED)
def test_a_saved_state_continues_bit_for_bit(name: str) -> None:
    rule, course = LEARNED[name], loss_course(4, 17)
    gramians = torch.stack([gradients("imbalanced", 4, seed) for seed in range(16)])
    gramians = gramians @ gramians.mT
    expected = weights_over_time(rule, course, gramians)
    weights_over_time(rule, course[:9], gramians[:8])
    saved, fresh = rule.state_dict(), replace(rule)
    assert fresh.state_dict() == {}
    fresh.load_state_dict(saved)
    pairs = zip(course[8:-1], course[9:], gramians[8:], strict=True)
    continued = torch.stack([step(fresh, old, new, gramian) for old, new, gramian in pairs])
    assert torch.equal(continued, expected[8:])


@pytest.mark.parametrize("name", LEARNED)
def test_a_call_leaves_the_given_state_as_it_was(name: str) -> None:
    rule = LEARNED[name]
    state = {key: value + 0.25 for key, value in rule.initial_state((3,), 0).items()}
    before = {key: value.clone() for key, value in state.items()}
    losses = torch.tensor([0.3, 0.4, 2.0])
    result = rule.aggregate(torch.eye(3), losses=losses, state=state)
    after = rule.after_step(state, losses, losses / 2)
    assert set(result.state) == set(after) == set(before)
    assert all(torch.equal(state[key], before[key]) for key in state)


@pytest.mark.parametrize("name", LEARNED)
def test_a_negative_loss_is_refused_by_name_or_by_nan(name: str) -> None:
    rule, losses = replace(LEARNED[name]), torch.tensor([0.3, -0.4, 2.0])
    with pytest.raises(ValueError, match=rf"losses: {type(rule).__name__} needs losses >= 0, that of task 1 is -0.4"):
        rule(torch.eye(3), losses=losses)
    assert rule.critic_only
    assert rule.aggregate(torch.eye(3), losses=losses).weights.isnan()[1]
    without_gradient = torch.diag(torch.tensor([1.0, 0.0, 1.0]))
    assert rule.aggregate(without_gradient, losses=losses).weights.isnan()[1]


@pytest.mark.parametrize("name", LEARNED)
def test_missing_losses_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"losses: got None, {type(LEARNED[name]).__name__} needs one per task"):
        LEARNED[name](torch.eye(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UncertaintyWeighting(w_lr=-1.0), "UncertaintyWeighting.w_lr: got -1.0, allowed: 0.0 to 1.0"),
        (lambda: DWA(temperature=0.0), "DWA.temperature: got 0.0, allowed: 1e-06 to"),
        (lambda: DWA(window=0), "DWA.window: got 0, allowed: 1 to"),
        (lambda: GradNorm(alpha=math.nan), "GradNorm.alpha: got nan"),
        (lambda: GradNorm(w_lr=2.0), "GradNorm.w_lr: got 2.0"),
        (lambda: FAMO(variant="official"), "FAMO.variant: got 'official', allowed: 'paper', 'official_rl'"),
        (lambda: FAMO(gamma=-0.1), "FAMO.gamma: got -0.1"),
        (lambda: FAMO(w_lr=math.inf), "FAMO.w_lr: got inf"),
    ],
)
def test_a_wrong_field_is_refused_by_name(make: Callable[[], Aggregator], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", LEARNED)
def test_compiles_as_one_graph(name: str) -> None:
    rule = LEARNED[name]
    state = {key: value + 0.1 for key, value in rule.initial_state((3,), 0).items()}

    def call(gramian: Tensor, losses: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        result = rule.aggregate(gramian, losses=losses, state=state)
        return result.weights, rule.after_step(result.state, losses, losses / 2)

    inputs = torch.eye(3), torch.tensor([0.3, 0.4, 2.0]), state
    compiled = torch.compile(call, fullgraph=True, backend="eager")(*inputs)
    expected = call(*inputs)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [*LEARNED, "rlw"])
def test_never_looks_at_a_value_on_the_device(name: str) -> None:
    """Tensors on `meta` have no values, so any look raises."""
    rule = RLW() if name == "rlw" else LEARNED[name]
    losses = torch.empty(2, 5, device="meta")
    noise = torch.empty(5, device="meta") if name == "rlw" else None
    result = rule.aggregate(torch.empty(2, 5, 5, device="meta"), noise, losses)
    rule.after_step(result.state, losses, losses)
    assert result.weights.shape == (2, 5)


def test_the_direction_is_the_weighted_sum_of_the_gradients() -> None:
    jacobian = gradients("gauss", 3)
    noise = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(direction(RLW(), jacobian, noise), jacobian.mean(0))


def test_rlw_weighs_own_parameters_too() -> None:
    result = RLW()(torch.diag(torch.tensor([1.0, 0.0, 1.0])), torch.tensor([0.5, 1.0, -1.0]))
    assert torch.equal(result.own_weights, torch.tensor([0.5, 1.0, -1.0]).double().softmax(-1))
    assert result.weights[1] == 0
