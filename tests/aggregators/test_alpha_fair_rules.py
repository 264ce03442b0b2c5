"""Nash-MTL and FairGrad: M w = w^(-1/alpha) at every scale, what follows from it, and what the options do."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import oracles
import pytest
import torch
from gradient_families import FAMILIES, FULL_RANK, direction, gradients, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtrl_imgrad.aggregators import FairGrad, NashMTL
from mtrl_imgrad.aggregators.solvers import alpha_fair

SIZES = (1, 2, 3, 10, 50)
SCALES = (1e-4, 1.0, 1e4)
RULES = {
    "nash": (NashMTL(norm="own"), 1.0),
    "fairgrad-0.5": (FairGrad(alpha=0.5, norm="own"), 0.5),
    "fairgrad-1": (FairGrad(alpha=1.0, norm="own"), 1.0),
    "fairgrad-2": (FairGrad(norm="own"), 2.0),
    "fairgrad-5": (FairGrad(alpha=5.0, norm="own"), 5.0),
    "fairgrad-10": (FairGrad(alpha=10.0, norm="own"), 10.0),
}
every_rule = pytest.mark.parametrize("name", RULES)
few = settings(max_examples=15, deadline=None, derandomize=True)
# lowrank has 0 in the hull for most seeds and K > 5.
solvable = given(
    family=st.sampled_from(FULL_RANK), num_tasks=st.integers(1, 8), seed=st.integers(0, 10_000), data=st.data()
)


def residual(jacobian: Tensor, weights: Tensor, alpha: float) -> float:
    """max_i |<g_i, d> w_i^(1/alpha) - 1|, from the gradients themselves."""
    products = jacobian @ (weights @ jacobian)
    return float((products * weights.pow(1 / alpha) - 1).abs().max())


@every_rule
@pytest.mark.parametrize("family", FAMILIES)
def test_the_equation_holds_to_1e_9(family: str, name: str) -> None:
    rule, alpha = RULES[name]
    for num_tasks in SIZES:
        if family == "lowrank" and num_tasks > 5:
            continue
        for scale in SCALES:
            jacobian = gradients(family, num_tasks, 2) * scale
            result = rule(jacobian @ jacobian.mT)
            assert (result.weights > 0).all()
            assert residual(jacobian, result.weights, alpha) < 1e-9
            assert result.diagnostics["residual"] < 1e-9


@pytest.mark.parametrize("num_tasks", [2, 3, 10])
@pytest.mark.parametrize("family", ["gauss", "shared", "parallel", "conflict"])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_direction_is_clarabels_fairest(alpha: float, family: str, num_tasks: int) -> None:
    """The best sum of utilities over the unit ball has the direction of J^T w."""
    jacobian = oracles.coordinates(gradients(family, num_tasks, 1).numpy())
    variable = cp.Variable(jacobian.shape[1])
    gains = jacobian @ variable
    utility = cp.sum(cp.log(gains)) if alpha == 1.0 else -cp.sum(cp.inv_pos(gains))
    oracles.solve(cp.Problem(cp.Maximize(utility), [cp.norm(variable) <= 1]))
    expected = np.asarray(variable.value)
    found = direction(FairGrad(alpha=alpha), torch.from_numpy(jacobian)).numpy()
    cosine = expected @ found / np.linalg.norm(expected) / np.linalg.norm(found)
    assert 1 - cosine <= 1e-8


def test_no_solution_where_0_lies_in_the_hull() -> None:
    """Documented: weights 0, so d = 0."""
    for num_tasks in (10, 50):
        jacobian = gradients("lowrank", num_tasks)
        for rule, _ in RULES.values():
            result = rule(jacobian @ jacobian.mT)
            assert result.weights.abs().max() == 0
            assert result.diagnostics["residual"] == 0


@every_rule
def test_a_million_to_one_still_has_its_direction(name: str) -> None:
    """The residual may stay larger, see the docstring; the first step beyond the answer no longer moves d."""
    rule, alpha = RULES[name]
    jacobian = gradients("conflict", 5)
    jacobian[1] *= 1e6
    result = rule(jacobian @ jacobian.mT)
    assert (result.weights > 0).all()
    if alpha <= 2:
        assert residual(jacobian, result.weights, alpha) < {0.5: 1e-5, 1.0: 1e-10, 2.0: 1e-7}[alpha]


@every_rule
def test_unequal_gradients_of_many_seeds_have_their_residual(name: str) -> None:
    rule, _ = RULES[name]
    for num_tasks, seeds in ((50, range(100, 160)), (10, range(20))):
        jacobian = torch.stack([gradients("imbalanced", num_tasks, seed) for seed in seeds])
        assert rule(jacobian @ jacobian.mT).diagnostics["residual"].max() < 1e-9


@every_rule
@pytest.mark.parametrize(("decades", "bound"), [(4, 1e-9), (6, 1e-7)])
def test_strong_conflict_between_unequal_gradients_has_its_residual(name: str, decades: int, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_tasks in (2, 5, 20):
        jacobian = torch.randn(30, num_tasks, 4 * num_tasks + 7, generator=generator, dtype=torch.float64)
        jacobian = jacobian - 0.95 * jacobian.mean(1, keepdim=True)
        spread = torch.rand(30, num_tasks, 1, generator=generator, dtype=torch.float64) - 0.5
        jacobian = jacobian * 10.0 ** (decades * spread)
        assert RULES[name][0](jacobian @ jacobian.mT).diagnostics["residual"].max() < bound


@every_rule
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_residual_of_nearly_opposed_gradients_is_rounding_over_the_smallest_eigenvalue(name, distance) -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-3.0, distance]], dtype=torch.float64)
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    smallest = torch.linalg.svdvals(units)[-1] ** 2
    result = RULES[name][0](jacobian @ jacobian.mT)
    assert result.diagnostics["residual"] < 1e-15 / smallest
    assert (jacobian @ (result.weights @ jacobian) > 0).all()


@few
@solvable
def test_nash_ignores_the_lengths_of_the_gradients(family, num_tasks, seed, data) -> None:
    jacobian = gradients(family, num_tasks, seed)
    lengths = 10.0 ** torch.tensor([data.draw(st.floats(-2, 2)) for _ in range(num_tasks)], dtype=torch.float64)
    rule = NashMTL(norm="own")
    assert relative_error(direction(rule, jacobian * lengths[:, None]), direction(rule, jacobian)) < 1e-8


@few
@solvable
def test_the_length_of_the_direction_is_the_one_stated(family, num_tasks, seed, data) -> None:
    jacobian = gradients(family, num_tasks, seed) * 10.0 ** data.draw(st.integers(-4, 4))
    mean_norm = jacobian.mean(0).norm().item()
    assert direction(NashMTL(norm="own"), jacobian).norm().item() == pytest.approx(num_tasks**0.5, rel=1e-8)
    weights = FairGrad(norm="own")(jacobian @ jacobian.mT).weights
    assert (weights @ jacobian).norm().item() == pytest.approx(weights.sqrt().sum().sqrt().item(), rel=1e-8)
    for rule in (NashMTL(), FairGrad()):
        assert direction(rule, jacobian).norm().item() == pytest.approx(mean_norm, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_is_homogeneous_of_the_degree_stated(alpha: float) -> None:
    jacobian, rule = gradients("imbalanced", 4), FairGrad(alpha=alpha, norm="own")
    expected = direction(rule, jacobian) * 1e3 ** ((1 - alpha) / (1 + alpha))
    assert relative_error(direction(rule, jacobian * 1e3), expected) < 1e-9


def test_one_task_gives_its_gradient_at_the_length_stated() -> None:
    gradient = gradients("gauss", 1) * 7
    norm = gradient.norm()
    assert relative_error(direction(NashMTL(norm="own"), gradient), gradient[0] / norm) < 1e-12
    assert relative_error(direction(FairGrad(norm="own"), gradient), gradient[0] / norm * norm ** (-1 / 3)) < 1e-12


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_identical_gradients_share_equally(num_tasks: int) -> None:
    gradient = gradients("gauss", 1)[0] * 3
    jacobian = gradient.expand(num_tasks, -1)
    assert relative_error(direction(NashMTL(norm="own"), jacobian), num_tasks**0.5 * gradient / gradient.norm()) < 1e-10
    weights = FairGrad()(jacobian @ jacobian.mT).weights
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / num_tasks))


def test_alpha_1_is_nash() -> None:
    for family in FAMILIES:
        jacobian = gradients(family, 5)
        for norm in ("mean", "own"):
            nash, fair = NashMTL(norm=norm), FairGrad(alpha=1.0, norm=norm)
            assert relative_error(direction(fair, jacobian), direction(nash, jacobian)) < 1e-9


def test_a_larger_alpha_makes_the_gains_more_equal() -> None:
    jacobian = gradients("gauss", 5, 3) * torch.logspace(-0.5, 0.5, 5, dtype=torch.float64)[:, None]
    spreads = []
    for alpha in (0.5, 1.0, 2.0, 5.0, 10.0):
        gains = jacobian @ direction(FairGrad(alpha=alpha), jacobian)
        spreads.append((gains.max() / gains.min()).item())
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 1.5 < spreads[0]


@pytest.mark.parametrize("rule", [NashMTL(norm="own"), FairGrad(norm="own")], ids=["nash", "fairgrad"])
def test_a_task_without_gradient_changes_nothing(rule) -> None:
    jacobian = gradients("conflict", 4)
    extended = torch.cat([jacobian, torch.zeros_like(jacobian[:1])])
    assert relative_error(direction(rule, extended), direction(rule, jacobian)) < 1e-10


def test_max_norm_clips_long_directions_only() -> None:
    jacobian = gradients("gauss", 9)
    assert direction(NashMTL(norm="own", max_norm=1.0), jacobian).norm().item() == pytest.approx(1.0)
    plain = direction(NashMTL(norm="own"), jacobian)
    torch.testing.assert_close(direction(NashMTL(norm="own", max_norm=5.0), jacobian), plain)
    assert direction(NashMTL(max_norm=1e-3), jacobian * 1e4).norm().item() == pytest.approx(1e-3)
    short = direction(NashMTL(max_norm=1.0), jacobian * 1e-3)
    torch.testing.assert_close(short, direction(NashMTL(), jacobian * 1e-3))


def test_old_weights_are_used_on_new_gradients_between_two_solves() -> None:
    calls = [gradients("conflict", 4, seed) for seed in range(5)]
    gramians = [jacobian @ jacobian.mT for jacobian in calls]
    fresh = [NashMTL(norm="own")(gramian).weights for gramian in gramians]
    rule = NashMTL(norm="own", update_weights_every=2)
    used = [rule(gramian).weights for gramian in gramians]
    for call, weights in enumerate(used):
        torch.testing.assert_close(weights, fresh[call - call % 2])
    rescaled = NashMTL(update_weights_every=2)
    rescaled(gramians[0])
    old = fresh[0] @ calls[1]
    expected = old / old.norm() * calls[1].mean(0).norm()
    assert relative_error(rescaled(gramians[1]).weights @ calls[1], expected) < 1e-10


def test_the_state_goes_on_bit_for_bit() -> None:
    gramians = [jacobian @ jacobian.mT for jacobian in (gradients("conflict", 3, seed) for seed in range(7))]
    rule, other = NashMTL(update_weights_every=3), NashMTL(update_weights_every=3)
    for gramian in gramians[:4]:
        rule(gramian)
    other.load_state_dict(rule.state_dict())
    assert set(rule.state_dict()) == {"alpha", "step"}
    for gramian in gramians[4:]:
        assert torch.equal(rule(gramian).weights, other(gramian).weights)
    assert NashMTL().initial_state((3,), 0) == {}


def test_a_batch_counts_its_own_steps() -> None:
    rule = NashMTL(update_weights_every=2, norm="own")
    first, second = (torch.stack([gradients("gauss", 3, seed) for seed in seeds]) for seeds in ((0, 1), (2, 3)))
    state = rule.aggregate(first @ first.mT).state | {"step": torch.tensor([1, 2])}
    weights = rule.aggregate(second @ second.mT, state=state).weights
    torch.testing.assert_close(weights[0], rule.aggregate(first[0] @ first[0].mT).weights)
    torch.testing.assert_close(weights[1], rule.aggregate(second[1] @ second[1].mT).weights)


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        (NashMTL, {"norm": "sum"}, r"NashMTL.norm: got 'sum', allowed: 'mean', 'own'"),
        (NashMTL, {"max_norm": -1.0}, r"NashMTL.max_norm: got -1.0"),
        (NashMTL, {"max_norm": float("inf")}, r"NashMTL.max_norm: got inf"),
        (NashMTL, {"update_weights_every": 0}, r"NashMTL.update_weights_every: got 0, allowed: 1"),
        (FairGrad, {"alpha": 0.1}, r"FairGrad.alpha: got 0.1, allowed: 0.5 to 10.0"),
        (FairGrad, {"alpha": float("nan")}, r"FairGrad.alpha: got nan"),
        (FairGrad, {"norm": "sum"}, r"FairGrad.norm: got 'sum'"),
    ],
)
def test_a_wrong_field_is_refused_by_name(rule, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**fields)


def test_the_steps_are_more_than_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of Nash-MTL's steps do already on the family that needs most."""
    monkeypatch.setattr(alpha_fair, "NASH_STEPS", 8)
    for num_tasks in SIZES:
        jacobian = gradients("conflict", num_tasks)
        assert residual(jacobian, NashMTL(norm="own")(jacobian @ jacobian.mT).weights, 1.0) < 1e-9
