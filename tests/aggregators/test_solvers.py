"""The simplex kernel: certified, the same on both routes, and open to torch.compile and devices without host copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracles
import pytest
import torch
from gradient_families import FAMILIES, ROUTES, RULES, SOLVED, gradients, noise_for
from torch import Tensor

from mtrl_imgrad.aggregators import Aggregation, Aggregator, Given, imgrad_nash
from mtrl_imgrad.aggregators.solvers import alpha_fair, dual_cone, minimise_on_simplex, simplex

# (r, q) next to p = <g_i, g0>; with q = 0 the minimiser is CAGrad's at that radius.
KERNELS = {"cagrad": (0.4, 0.0), "quadratic": (0.0, 1.0), "both": (0.3, 0.7), "linear": (0.0, 0.0)}


def batch(family: str, num_tasks: int) -> Tensor:
    """Jacobians at three scales and two seeds, [6, tasks, P]."""
    rows = [gradients(family, num_tasks, seed) for seed in (5, 6)]
    return torch.stack([scale * row for row in rows for scale in (1e-4, 1.0, 1e4)])


def with_solver(name: str, route: str) -> Aggregator:
    rule = RULES[name]
    return type(rule)(**(vars(rule) | {"solver": route}))


def kernel(jacobian: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gramian of mean diagonal 1, p, r, q."""
    gramian = jacobian @ jacobian.mT
    gramian = gramian / gramian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    products = gramian.mean(-1)
    norm, quadratic = KERNELS[name]
    mean_norm = products.mean(-1).clamp_min(0.0).sqrt()
    return gramian, products, norm * mean_norm, torch.full_like(mean_norm, quadratic)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_duality_gap_is_below_1e_9(family: str, name: str, route: str) -> None:
    """Certified here from w alone: f is convex, so f(w) - f* <= max_i (w - e_i).grad f(w)."""
    for num_tasks in (1, 2, 3, 10, 50):
        gramian, linear, norm, quadratic = kernel(batch(family, num_tasks), name)
        active = torch.ones_like(linear, dtype=torch.bool)
        solution = minimise_on_simplex(gramian, linear, norm, quadratic, active, solver=route)
        weights = solution.weights
        assert (weights >= 0).all()
        assert weights.sum(-1) == pytest.approx(torch.ones(6))
        image = (gramian @ weights[..., None]).squeeze(-1)
        length = (weights * image).sum(-1).sqrt()
        slope = linear + quadratic[..., None] * image
        slope = slope + torch.where(norm > 0, norm / length, 0.0)[..., None] * image
        uniform = torch.full_like(weights, 1 / num_tasks)
        uniform_norm = linear.mean(-1)  # = ||g0||^2
        value = (linear * uniform).sum(-1) + norm * uniform_norm.sqrt() + quadratic / 2 * uniform_norm
        gap = ((weights * slope).sum(-1) - slope.amin(-1)) / value
        assert gap.max() < 1e-9
        assert solution.gap.max() < 1e-9


def value(weights: np.ndarray, jacobian: Tensor, linear: Tensor, norm: Tensor, quadratic: Tensor) -> float:
    """f(w), from the gradients themselves."""
    length = float(np.linalg.norm(weights @ jacobian.numpy()))
    return float(linear.numpy() @ weights) + norm.item() * length + quadratic.item() / 2 * length**2


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_tasks", [3, 10, 50])
def test_the_optimum_is_clarabels_on_both_routes(name: str, num_tasks: int) -> None:
    for family in FAMILIES:
        jacobian = torch.from_numpy(oracles.coordinates(gradients(family, num_tasks, 2).numpy()))
        gramian, *terms = kernel(jacobian, name)
        linear, norm, quadratic = terms
        best = oracles.simplex_kernel(jacobian.numpy(), linear.numpy(), norm.item(), quadratic.item())
        expected = value(best, jacobian, *terms)
        for route in ROUTES:
            active = torch.ones(num_tasks, dtype=torch.bool)
            weights = minimise_on_simplex(gramian, *terms, active, solver=route).weights.numpy()
            # CLARABEL's point is feasible to about 1e-8, so it may seem better by that much.
            assert expected - 1e-7 <= value(weights, jacobian, *terms) <= expected + 1e-9


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_routes_give_the_same_direction(family: str, name: str) -> None:
    for num_tasks in (1, 2, 3, 10, 50):
        jacobian = batch(family, num_tasks)
        noise = noise_for(RULES[name], num_tasks)
        host, device = (with_solver(name, route)(jacobian @ jacobian.mT, noise).weights for route in ROUTES)
        host, device = ((weights[:, None] @ jacobian).squeeze(1) for weights in (host, device))
        unit = (jacobian**2).sum(-1).mean(-1).sqrt()
        assert ((host - device).norm(dim=-1) / unit).max() < 1e-9


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rounded_indefinite_gramian_still_has_an_answer(dtype: torch.dtype, route: str) -> None:
    jacobian = gradients("lowrank", 50)
    gramian = (jacobian @ jacobian.mT).to(dtype)
    assert torch.linalg.eigvalsh(gramian.double()).min() < 0
    for name in SOLVED:
        weights = with_solver(name, route)(gramian).weights
        assert torch.isfinite(weights).all()


@pytest.mark.parametrize("route", ROUTES)
def test_ties_of_a_linear_objective_go_to_the_shortest_combination(route: str) -> None:
    gramian = torch.eye(3, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    linear = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    solution = minimise_on_simplex(gramian, linear, zero, zero, torch.ones(3, dtype=torch.bool), solver=route)
    assert solution.weights.tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)


@pytest.fixture
def short_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing unrolls the interior point; three steps show as much of its graph as all of them."""
    monkeypatch.setattr(simplex, "INTERIOR_POINT_STEPS", 3)
    monkeypatch.setattr(dual_cone, "INTERIOR_POINT_STEPS", 3)
    monkeypatch.setattr(alpha_fair, "NASH_STEPS", 3)
    monkeypatch.setattr(imgrad_nash, "STEPS", 3)


@pytest.mark.usefixtures("short_loop")
@pytest.mark.parametrize("name", RULES)
def test_compiles_as_one_graph(name: str) -> None:
    rule = with_solver(name, "device") if name in SOLVED else RULES[name]
    jacobian = torch.stack([gradients("conflict", 4, seed) for seed in (0, 1)])
    gramian, noise = jacobian @ jacobian.mT, noise_for(rule, 4)
    torch._dynamo.reset()  # the limit on recompilations counts those of all rules
    compiled = torch.compile(
        lambda matrix, numbers: rule.aggregate(matrix, numbers).weights, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(gramian, noise), rule.aggregate(gramian, noise).weights, rtol=1e-9, atol=1e-10)


@dataclass(frozen=True)
class Waiting(Aggregator):
    """A rule that does what no rule may do: look at a number on the host."""

    how: str

    def solve(self, given: Given) -> Aggregation:
        look = {
            "item": lambda x: x.sum().item(),
            "tolist": lambda x: x.tolist(),
            "numpy": lambda x: x.numpy(),
            "cpu": lambda x: x.cpu(),
            "nonzero": lambda x: x.nonzero(),
            "branch": lambda x: bool(x.sum() > 0),
        }[self.how]
        look(given.gramian)
        return Aggregation(given.gramian[..., 0])


def on_meta(rule: Aggregator) -> Tensor:
    """Runs a rule on tensors that have a device and shapes but no values, so any look at a value raises."""
    noise = rule.draw_noise(5)
    return rule.aggregate(torch.empty(2, 5, 5, device="meta"), None if noise is None else noise.to("meta")).weights


@pytest.mark.usefixtures("short_loop")
@pytest.mark.parametrize("name", RULES)
def test_never_looks_at_a_value_on_the_device(name: str) -> None:
    assert on_meta(RULES[name]).shape == (2, 5)


@pytest.mark.usefixtures("short_loop")
@pytest.mark.parametrize("name", RULES)
def test_never_calls_what_waits_for_the_device_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These look at an error code on the host, which tensors without values do not show."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("waits for the device")

    for function in ("eigh", "eigvalsh", "cholesky", "solve", "inv", "lstsq", "svd", "pinv"):
        monkeypatch.setattr(torch.linalg, function, refuse)
    assert on_meta(RULES[name]).shape == (2, 5)


@pytest.mark.parametrize("how", ["item", "tolist", "numpy", "cpu", "nonzero", "branch"])
def test_the_test_above_notices_a_look(how: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        on_meta(Waiting(how))
