"""GradVac (PCGrad has its tests in test_identities.py and test_rules_against_oracles.py)."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from gradient_families import FAMILIES, gradients, noise_for, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrl_imgrad.aggregators import GradVac, PCGrad

TARGETS = "target_cosines"


def calls(rule: GradVac, jacobians: list[torch.Tensor], scale: float = 1.0) -> list[torch.Tensor]:
    """Directions of successive calls, with the noise of seeds 0, 1, ..."""
    return [
        rule(scale**2 * rows @ rows.mT, noise_for(rule, len(rows), seed)).weights @ rows * scale
        for seed, rows in enumerate(jacobians)
    ]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradvac_is_the_papers_loop(family: str, num_tasks: int, scale: float) -> None:
    rule, targets = GradVac(beta=0.3), np.zeros((num_tasks, num_tasks))
    for seed in range(3 if num_tasks < 50 else 2):
        jacobian, noise = gradients(family, num_tasks, seed) * scale, noise_for(rule, num_tasks, seed)
        expected, targets = oracles.gradvac_direction(jacobian.numpy(), noise.argsort(-1).numpy(), targets, 0.3)
        given = rule(jacobian @ jacobian.mT, noise).weights @ jacobian
        size = max(np.linalg.norm(expected), np.linalg.norm(jacobian.numpy(), axis=1).mean())
        assert np.linalg.norm(given.numpy() - expected) < 1e-12 * size
        # The angle of a p_i of which little is left is less certain than the sum of all p_i.
        np.testing.assert_allclose(rule.state_dict()[TARGETS].numpy(), targets, rtol=0, atol=1e-10)


def test_gradvac_without_an_average_is_pcgrad() -> None:
    for family, num_tasks in itertools.product(FAMILIES, (2, 3, 10)):
        jacobian = gradients(family, num_tasks)
        gramian, noise = jacobian @ jacobian.mT, noise_for(PCGrad(), num_tasks)
        torch.testing.assert_close(GradVac(beta=0.0)(gramian, noise).weights, PCGrad()(gramian, noise).weights)


def test_a_fired_pair_meets_at_the_target_angle() -> None:
    rule = GradVac()
    rule.load_state_dict({TARGETS: torch.tensor([[0.0, 0.6], [-1.0, 0.0]], dtype=torch.float64)})
    jacobian = gradients("gauss", 2, 1)
    changed = rule(jacobian @ jacobian.mT, noise_for(rule, 2)).weights @ jacobian * 2 - jacobian[1]
    assert torch.cosine_similarity(changed, jacobian[1], dim=0).item() == pytest.approx(0.6)


def test_the_average_moves_for_every_pair() -> None:
    jacobian = gradients("shared", 4)  # no pair is below its target of 0
    rule = GradVac(beta=0.25)
    rule(jacobian @ jacobian.mT, noise_for(rule, 4))
    unit = jacobian / jacobian.norm(dim=1, keepdim=True)
    cosines = unit @ unit.mT
    assert cosines.min() > 0
    expected = 0.25 * (cosines - torch.diag(cosines.diagonal()))
    torch.testing.assert_close(rule.state_dict()[TARGETS], expected, rtol=1e-12, atol=1e-12)


def test_targets_of_a_task_without_gradient_stay() -> None:
    rule, jacobian = GradVac(), gradients("conflict", 4)
    rule(jacobian @ jacobian.mT, noise_for(rule, 4))
    before = rule.state_dict()[TARGETS]
    jacobian[2] = 0.0
    result = rule(jacobian @ jacobian.mT, noise_for(rule, 4, 1))
    after = rule.state_dict()[TARGETS]
    assert result.weights[2] == 0
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[:, 2], before[:, 2])
    assert (after != before).sum() == 6


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES), num_tasks=st.integers(1, 8), scale=st.sampled_from([1e-6, 1e6]), data=st.data()
)
def test_permutations_and_scales_pass_through_the_state(family: str, num_tasks: int, scale: float, data) -> None:
    order = torch.tensor(data.draw(st.permutations(range(num_tasks))))
    one, other = GradVac(), GradVac()
    for seed in range(3):
        jacobian, noise = gradients(family, num_tasks, seed), noise_for(one, num_tasks, seed)
        given = one(jacobian @ jacobian.mT, noise).weights
        rows = jacobian[order] * scale
        torch.testing.assert_close(
            other(rows @ rows.mT, noise[order][:, order]).weights, given[order], rtol=1e-8, atol=1e-10
        )
    targets = one.state_dict()[TARGETS][order][:, order]
    torch.testing.assert_close(other.state_dict()[TARGETS], targets, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_tasks", [1, 2, 10])
def test_identical_gradients_stay_what_they_are_at_every_call(num_tasks: int) -> None:
    jacobian = gradients("gauss", 3)[:1].expand(num_tasks, -1)
    for found in calls(GradVac(), [jacobian] * 60):
        assert relative_error(found, jacobian[0]) < 1e-12


def test_rounding_of_a_cosine_of_one_fires_nothing() -> None:
    lengths = torch.rand(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    jacobian = lengths * gradients("gauss", 3)[:1]
    for below in (0.0, 1e-16, 5e-16, 1e-14):
        rule = GradVac()
        rule.load_state_dict({TARGETS: torch.full((6, 6), 1.0 - below, dtype=torch.float64)})
        found = rule(jacobian @ jacobian.mT, noise_for(rule, 6)).weights
        torch.testing.assert_close(found, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_a_target_of_one_is_finite() -> None:
    jacobian, rule = gradients("gauss", 2), GradVac()
    rule.load_state_dict({TARGETS: torch.ones(2, 2, dtype=torch.float64)})
    assert torch.isfinite(rule(jacobian @ jacobian.mT, noise_for(rule, 2)).weights).all()


def test_degenerate_gradients_never_give_nan() -> None:
    base = gradients("gauss", 4)
    opposed = torch.stack([base[0], -base[0], 3.0 * base[0], -base[1] * 1e6])
    zero = base.clone()
    zero[1] = 0.0
    rank_one = base[:1] * torch.tensor([[1.0], [-2.0], [0.5], [-1e-6]], dtype=torch.float64)
    rule = GradVac()
    for found in calls(rule, [opposed, zero, rank_one, opposed, base.new_ones(4, 23), opposed, rank_one] * 3):
        assert torch.isfinite(found).all()
    targets = rule.state_dict()[TARGETS]
    assert (targets.abs() <= 1).all()


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    jacobians = [gradients("conflict", 6, seed) for seed in range(6)]
    one = GradVac()
    calls(one, jacobians[:3])
    other = GradVac()
    other.load_state_dict(one.state_dict())
    for expected, found in zip(calls(one, jacobians[3:]), calls(other, jacobians[3:]), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(one.state_dict()[TARGETS], other.state_dict()[TARGETS])
    assert not torch.equal(calls(GradVac(), jacobians[3:])[0], calls(one, jacobians[3:])[0])


def test_beta_changes_the_second_call() -> None:
    jacobians = [gradients("shared", 4, 0), gradients("conflict", 4, 1)]
    first, second = calls(GradVac(beta=0.1), jacobians), calls(GradVac(beta=0.9), jacobians)
    assert torch.equal(first[0], second[0])
    assert relative_error(first[1], second[1]) > 1e-3


@pytest.mark.parametrize("rule", [PCGrad(), GradVac()], ids=lambda rule: type(rule).__name__)
def test_the_order_matters_and_missing_noise_is_told(rule) -> None:
    jacobian = gradients("conflict", 6)
    gramian = jacobian @ jacobian.mT
    one, other = (rule.aggregate(gramian, noise_for(rule, 6, seed)).weights for seed in (1, 2))
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match=r"noise: got None, need \[..., 6, 6\]"):
        rule.aggregate(gramian)
