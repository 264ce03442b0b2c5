"""Identities that hold for every Gramian, or on inputs whose answer is known in closed form."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from gradient_families import FAMILIES, ROUTES, RULES, SOLVED, direction, gradients, noise_for, permuted, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl_imgrad.aggregators import MGDA, CAGrad, ConicGrad, IMGrad, Mean, PCGrad

# What K identical gradients g become: this constant times g.
IDENTICAL = dict.fromkeys(RULES, 1.0) | dict.fromkeys(
    ("cagrad", "imgrad-official", "imgrad-eq9", "imgrad-eq11"), (1 + 0.4) / (1 + 0.4**2)
)  # cagrad-fast divides by 1 + c
everywhere = given(
    family=st.sampled_from(FAMILIES), num_tasks=st.integers(1, 8), seed=st.integers(0, 10_000), data=st.data()
)
few = settings(max_examples=15, derandomize=True)
TOLERANCE = 1e-7


def vector(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def assert_same(found: torch.Tensor, expected: torch.Tensor, family: str, jacobian: torch.Tensor) -> None:
    """Relative to the direction's length, which is short where norms differ; `lowrank` has 0 in the hull, and there the
    direction of a vanishing one is rounding error: relative to the gradients."""
    size = jacobian.norm(dim=1).square().mean().sqrt() if family == "lowrank" else expected.norm()
    assert (found - expected).norm() < TOLERANCE * size


@pytest.mark.parametrize("name", RULES)
@few
@everywhere
def test_permuting_the_tasks_leaves_the_direction(name, family, num_tasks, seed, data) -> None:
    rule, jacobian = RULES[name], gradients(family, num_tasks, seed)
    order = torch.tensor(data.draw(st.permutations(range(num_tasks))))
    noise = noise_for(rule, num_tasks, seed)
    permuted_noise = permuted(rule, noise, order)
    expected = direction(rule, jacobian, noise)
    assert_same(direction(rule, jacobian[order], permuted_noise), expected, family, jacobian)


@pytest.mark.parametrize("name", RULES)
@few
@everywhere
def test_scaling_the_gradients_scales_the_direction(name, family, num_tasks, seed, data) -> None:
    rule, jacobian = RULES[name], gradients(family, num_tasks, seed)
    scale = 10.0 ** data.draw(st.integers(-6, 6))
    noise = noise_for(rule, num_tasks, seed)
    expected = direction(rule, jacobian, noise)
    assert_same(direction(rule, jacobian * scale, noise) / scale, expected, family, jacobian)


@pytest.mark.parametrize("num_tasks", [1, 3, 10])
@pytest.mark.parametrize("name", RULES)
def test_identical_gradients_keep_their_direction(name: str, num_tasks: int) -> None:
    gradient = gradients("gauss", 4)[0]
    given = direction(RULES[name], gradient.expand(num_tasks, -1), noise_for(RULES[name], num_tasks))
    constant = num_tasks if name == "sum" else IDENTICAL[name]
    assert relative_error(given, constant * gradient) < 1e-9


@pytest.mark.parametrize("name", RULES)
def test_an_opposed_equal_pair_gives_nothing(name: str) -> None:
    gradient = gradients("gauss", 4)[0]
    noise = noise_for(RULES[name], 2)
    given = direction(RULES[name], torch.stack([gradient, -gradient]), noise)
    if name == "rlw":  # its weights do not look at the gradients
        torch.testing.assert_close(given, torch.tanh((noise[0] - noise[1]) / 2) * gradient)
    else:
        assert given.norm() < 1e-7 * gradient.norm()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", RULES)
def test_a_task_without_gradient_gets_weight_0_and_stops_nobody(name: str, route: str) -> None:
    rule = RULES[name]
    rule = type(rule)(**(vars(rule) | {"solver": route})) if name in SOLVED else rule
    jacobian = gradients("shared", 4)
    jacobian[2] = 0.0
    result = rule(jacobian @ jacobian.mT, noise_for(rule, 4))
    assert result.weights[2] == 0
    assert torch.isfinite(result.weights).all()
    assert (result.weights @ jacobian).norm() > 0.1 * jacobian.mean(0).norm()


@pytest.mark.parametrize("name", ["mgda", "cagrad", "pcgrad"])
def test_a_task_without_gradient_changes_only_the_mean(name: str) -> None:
    """These rules see such a task only through g0 (CAGrad) or 1/K (PCGrad), or not at all (MGDA)."""
    jacobian = gradients("shared", 4)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    if name == "mgda":
        assert relative_error(direction(MGDA(), extended), direction(MGDA(), jacobian)) < 1e-9
    elif name == "pcgrad":
        noise = noise_for(PCGrad(), 5)
        expected = direction(PCGrad(), jacobian, noise[:4, :4]) * 4 / 5
        assert relative_error(direction(PCGrad(), extended, noise), expected) < 1e-12
    else:
        expected = direction(CAGrad(), jacobian) * 4 / 5
        assert relative_error(direction(CAGrad(), extended), expected) < 1e-9


@pytest.mark.parametrize("name", RULES)
def test_one_gradient_a_million_times_larger_is_handled(name: str) -> None:
    jacobian = gradients("shared", 5)
    jacobian[1] *= 1e6
    assert torch.isfinite(RULES[name](jacobian @ jacobian.mT, noise_for(RULES[name], 5)).weights).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SOLVED)
def test_one_gradient_a_million_times_larger_leaves_the_solution_certified(name: str, route: str) -> None:
    """`gap` alone is blind here: the long gradient dominates what it is relative to."""
    rule = dataclasses.replace(RULES[name], solver=route)
    for family in ("shared", "gauss", "conflict"):
        jacobian = gradients(family, 5)
        jacobian[1] *= 1e6
        result = rule(jacobian @ jacobian.mT, noise_for(rule, 5))
        assert result.diagnostics["gap"] < 1e-9
        if name in ("upgrad", "dualproj"):  # these look at the gradients' cosines alone
            found = result.weights @ jacobian
            assert (jacobian @ found / jacobian.norm(dim=1) / found.norm()).min() > -1e-9
        else:
            assert result.diagnostics["relative_gap"] < 1e-8


def test_mgda_has_the_obtuse_property() -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 5, 4)
        shortest = direction(MGDA(), jacobian)
        products = jacobian @ shortest
        assert (products >= shortest @ shortest - 1e-9 * products.abs().max()).all()
        assert shortest.norm() <= jacobian.norm(dim=1).min() * (1 + 1e-9)


def test_mgda_of_two_tasks_is_the_closed_form() -> None:
    first, second = vector(2.0, 1.0), vector(-1.0, 1.5)
    weight = ((second @ second - first @ second) / ((first - second) @ (first - second))).clamp(0, 1)
    jacobian = torch.stack([first, second])
    expected = torch.stack([weight, 1 - weight])
    torch.testing.assert_close(MGDA()(jacobian @ jacobian.mT).weights, expected, rtol=1e-10, atol=1e-10)


def test_mgda_of_parallel_gradients_is_the_shorter_one() -> None:
    jacobian = torch.stack([vector(1.0, 0.0), vector(3.0, 0.0)])
    assert MGDA()(jacobian @ jacobian.mT).weights.tolist() == pytest.approx([1.0, 0.0], abs=1e-10)


@pytest.mark.parametrize("rule", [CAGrad(c=0.0), IMGrad(c=0.0), ConicGrad(c=1.0)], ids=lambda rule: type(rule).__name__)
def test_no_room_around_the_mean_leaves_the_mean(rule) -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 6)
        assert relative_error(direction(rule, jacobian), direction(Mean(), jacobian)) < 1e-7


@pytest.mark.parametrize("rule", [CAGrad(c=0.7, rescale=0), IMGrad(c=0.7, rescale=0)], ids=["cagrad", "imgrad"])
def test_the_direction_lies_on_the_sphere_around_the_mean(rule) -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 5)
        mean = jacobian.mean(0)
        assert (direction(rule, jacobian) - mean).norm().item() == pytest.approx(0.7 * mean.norm().item(), rel=1e-6)


def test_cagrad_reaches_its_dual_optimum_and_never_opposes_the_mean() -> None:
    for family, c in itertools.product(FAMILIES, (0.1, 0.5, 0.9)):
        jacobian = gradients(family, 5)
        mean = jacobian.mean(0)
        row_weights = CAGrad(c=c, rescale=0)(jacobian @ jacobian.mT).weights
        given, dual_weights = row_weights @ jacobian, row_weights - 1 / 5
        combined = dual_weights / dual_weights.sum() @ jacobian
        dual = combined @ mean + c * mean.norm() * combined.norm()
        assert (jacobian @ given).min().item() == pytest.approx(dual.item(), rel=1e-7, abs=1e-7 * (mean @ mean).item())
        assert given @ mean >= (1 - c) * mean @ mean * (1 - 1e-9)


def test_a_wide_ball_turns_cagrad_towards_mgda() -> None:
    jacobian = gradients("conflict", 5)
    wide, shortest = direction(CAGrad(c=1e6, rescale=2), jacobian), direction(MGDA(), jacobian)
    assert torch.cosine_similarity(wide, shortest, dim=0) > 1 - 1e-9


def two_tasks_at_cosine(cosine: float) -> torch.Tensor:
    """Orthogonal gradients of lengths 1 and x have cos(g0, gm) = 2 x / (1 + x^2)."""
    ratio = (1 + math.sqrt(1 - cosine**2)) / cosine
    return torch.stack([vector(1.0, 0.0), vector(0.0, ratio)])


def test_imgrad_official_at_cosine_three_quarters_is_cagrad() -> None:
    jacobian = two_tasks_at_cosine(0.75)
    gramian = jacobian @ jacobian.mT
    result = IMGrad(c=0.4)(gramian)
    assert result.diagnostics["cos_theta"].item() == pytest.approx(0.75, abs=1e-9)
    torch.testing.assert_close(result.weights, CAGrad(c=0.4)(gramian).weights, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variant", ["official", "eq11"])
def test_imgrad_has_the_weights_of_cagrad_at_the_effective_radius(variant: str) -> None:
    for family in ("gauss", "shared", "conflict", "imbalanced"):
        jacobian = gradients(family, 4, 7)
        gramian = jacobian @ jacobian.mT
        cosine = IMGrad(variant=variant)(gramian).diagnostics["cos_theta"]
        effective = (0.4 * cosine / ({"official": 1.5, "eq11": 1.0}[variant] - cosine)).item()
        unit = direction(IMGrad(variant=variant, rescale=0), jacobian) - jacobian.mean(0)
        expected = direction(CAGrad(c=effective, rescale=0), jacobian) - jacobian.mean(0)
        assert torch.cosine_similarity(unit, expected, dim=0) > 1 - 1e-9


def test_imgrad_cosine_is_at_least_the_ratio_of_the_norms() -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 5, 8)
        cosine = IMGrad()(jacobian @ jacobian.mT).diagnostics["cos_theta"]
        ratio = direction(MGDA(), jacobian).norm() / jacobian.mean(0).norm()
        assert ratio - 1e-9 <= cosine <= 1


@few
@given(
    family=st.sampled_from(FAMILIES), num_tasks=st.integers(2, 8), seed=st.integers(0, 1000), c=st.floats(0.05, 0.99)
)
def test_conicgrad_keeps_the_norm_and_the_angle(family: str, num_tasks: int, seed: int, c: float) -> None:
    jacobian = gradients(family, num_tasks, seed)
    result, mean = ConicGrad(c=c)(jacobian @ jacobian.mT), jacobian.mean(0)
    given = result.weights @ jacobian
    assert given.norm().item() == pytest.approx(mean.norm().item(), rel=1e-6)
    cosine = torch.cosine_similarity(given, mean, dim=0).item()
    at_kink = num_tasks > 5 and family == "lowrank"  # then d = g0 is allowed
    assert cosine == pytest.approx(max(c, result.diagnostics["cos_theta"].item()), abs=1e-6) or (
        at_kink and cosine == pytest.approx(1.0)
    )


def test_conicgrad_is_monotone_in_the_cone() -> None:
    jacobian = gradients("imbalanced", 5)
    worst = [(jacobian @ direction(ConicGrad(c=c), jacobian)).min().item() for c in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert all(wide >= narrow - 1e-9 for wide, narrow in itertools.pairwise(worst))
    assert worst[0] > worst[-1]


def test_conicgrad_says_what_it_does_when_nothing_descends() -> None:
    """Opposed gradients of unequal length: every direction hurts one task."""
    jacobian = torch.stack([vector(1.0, 0.0, 0.0), vector(-2.0, 0.0, 0.0), vector(0.0, 1.0, 0.0)])
    mean = jacobian.mean(0)
    assert relative_error(direction(ConicGrad(c=0.9, on_infeasible="mean"), jacobian), mean) < 1e-9
    assert direction(ConicGrad(c=0.9, on_infeasible="zero"), jacobian).norm() == 0
    boundary = direction(ConicGrad(c=0.9, on_infeasible="boundary"), jacobian)
    assert torch.cosine_similarity(boundary, mean, dim=0).item() == pytest.approx(0.9)
    assert (jacobian @ boundary).min() > (jacobian @ mean).min()


def test_pcgrad_of_two_tasks_is_the_closed_form() -> None:
    jacobian = torch.stack([vector(2.0, 1.0), vector(-1.0, 0.5)])
    gramian = jacobian @ jacobian.mT
    assert gramian[0, 1] < 0
    expected = (1 - gramian[0, 1] / gramian.diagonal()) / 2
    torch.testing.assert_close(PCGrad()(gramian).weights, expected)


def test_pcgrad_without_conflict_is_the_mean() -> None:
    jacobian = gradients("parallel", 6)
    assert relative_error(direction(PCGrad(), jacobian), jacobian.mean(0)) < 1e-12


def test_pcgrad_permutes_exactly_with_its_noise() -> None:
    jacobian = gradients("conflict", 7)
    noise, order = noise_for(PCGrad(), 7, 1), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    gramian = jacobian @ jacobian.mT
    other = PCGrad()(gramian[order][:, order], noise[order][:, order]).weights
    torch.testing.assert_close(other, PCGrad()(gramian, noise).weights[order], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", [CAGrad, IMGrad], ids=lambda rule: rule.__name__)
def test_rescale_divides_by_what_it_says(rule) -> None:
    jacobian = gradients("conflict", 4)
    plain, official, linear = (direction(rule(c=0.5, rescale=choice), jacobian) for choice in (0, 1, 2))
    torch.testing.assert_close(official, plain / 1.25)
    torch.testing.assert_close(linear, plain / 1.5)
