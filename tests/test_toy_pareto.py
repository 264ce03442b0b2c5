"""The toy problem: its derivatives, its front, and that every kind of rule can walk on it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import toy_pareto as toy
from torch import Tensor

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregation, Aggregator, Given


def losses_by_torch(points: Tensor) -> Tensor:
    """Both losses as the CAGrad paper's code states them."""
    x, y = points.unbind(-1)
    upper, lower = (0.5 * y).tanh().clamp(min=0), (-0.5 * y).tanh().clamp(min=0)
    first = ((0.5 * (-x - 7) - (-y).tanh()).abs().clamp(min=5e-6).log() + 6) * upper
    second = ((0.5 * (-x + 3) + (-y).tanh() + 2).abs().clamp(min=5e-6).log() + 6) * upper
    first = first + (((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20) * lower
    second = second + (((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20) * lower
    return torch.stack([first, second], dim=-1)


def test_losses_and_derivatives_are_those_of_automatic_differentiation():
    points = torch.from_numpy(np.random.default_rng(0).uniform(-10, 10, (200, 2))).requires_grad_()
    expected = losses_by_torch(points)
    losses, jacobian = toy.toy(points.detach().numpy())
    np.testing.assert_allclose(losses, expected.detach().numpy(), atol=1e-12)
    for task in range(2):
        (gradient,) = torch.autograd.grad(expected[:, task].sum(), points, retain_graph=True)
        np.testing.assert_allclose(jacobian[:, task], gradient.numpy(), atol=1e-12)


def test_the_front_is_the_published_one_and_stationary():
    front = toy.front()
    np.testing.assert_allclose(front[len(front) // 2], (0, -8.3552), atol=1e-3)  # the star of the published figure
    np.testing.assert_allclose(front[[0, -1], 0], (7, -7), atol=1e-5)
    _, jacobian = toy.toy(front)
    shares = np.linspace(0, 1, len(front))[:, None]
    np.testing.assert_allclose((1 - shares) * jacobian[:, 0] + shares * jacobian[:, 1], 0, atol=1e-6)


def test_shifted_losses_are_positive_wherever_a_rule_may_walk():
    axis = np.linspace(-11, 11, 201)
    losses, _ = toy.toy(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    assert losses.min() + toy.SHIFT > 0


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_rule_walks(name):
    outcome = toy.run(name, 60)
    assert len(outcome.trajectories) == len(toy.STARTS)
    for start, trajectory in zip(toy.STARTS, outcome.trajectories, strict=True):
        assert (trajectory[0] == start).all()
        assert np.isfinite(trajectory).all()
        assert 0 < np.abs(trajectory[-1] - start).max() < 0.2
    assert outcome.reached(toy.front()) == ["neither"] * len(toy.STARTS)


SEEN: list[float] = []


@dataclass(frozen=True)
class Recording(Aggregator):
    """The mean gradient, by way of the Jacobian or of losses; it counts its calls."""

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> dict[str, Tensor]:
        return {"calls": torch.zeros(shape), "columns": torch.tensor(parameters)}

    def solve(self, given: Given) -> Aggregation:
        SEEN.append(float(given.state["calls"].max()))
        weights = torch.full_like(given.active, 0.5, dtype=torch.float64)
        return Aggregation(weights, state={"calls": given.state["calls"] + 1})


@dataclass(frozen=True)
class ByJacobian(Recording):
    needs = "jacobian"

    def solve(self, given: Given) -> Aggregation:
        assert given.jacobian is not None
        return replace(super().solve(given), direction=given.jacobian.mean(0))


@dataclass(frozen=True)
class Preconditioned(ByJacobian):
    preconditioned = True


@dataclass(frozen=True)
class ByLosses(Recording):
    needs = "losses"
    critic_only = True
    sees_new_losses = True

    def solve(self, given: Given) -> Aggregation:
        assert given.losses is not None
        assert (given.losses > 0).all()
        return super().solve(given)

    def after_step(self, state: dict[str, Tensor], losses: Tensor, new_losses: Tensor) -> dict[str, Tensor]:
        assert (losses - new_losses).abs().max() < 0.1
        assert (losses != new_losses).any()
        return state


def test_rules_of_every_kind_take_the_same_steps():
    expected = toy.descend(AGGREGATORS["mean"](), toy.STARTS, 100)
    for rule, walks in ((ByJacobian(), len(toy.STARTS)), (ByLosses(), 1)):
        SEEN.clear()
        for given, other in zip(toy.descend(rule, toy.STARTS, 100), expected, strict=True):
            np.testing.assert_allclose(given, other, atol=1e-9)
        assert [*range(100)] * walks == SEEN, "the state of one call is not that of the next"


def test_a_preconditioned_direction_is_the_step_itself():
    (trajectory,) = toy.descend(Preconditioned(), toy.STARTS[:1], 1)
    _, jacobian = toy.toy(toy.STARTS[:1])
    np.testing.assert_allclose(trajectory[1] - trajectory[0], -1e-3 * jacobian[0].mean(0), atol=1e-12)


def test_a_start_at_rest_stops_and_the_others_go_on():
    starts = np.array([toy.front()[70], (9.0, 9.0)])
    short, long = toy.descend(AGGREGATORS["mean"](), starts, 3 * toy.WINDOW)
    assert len(short) < len(long)


def test_the_table_and_the_figure_tell_what_was_reached():
    front = toy.front()
    ends = [front[70], front[20], (9.0, 9.0), front[70], front[140]]
    outcome = toy.Outcome("rule", [np.array([start, end]) for start, end in zip(toy.STARTS, ends, strict=True)], 4000)
    assert outcome.reached(front) == ["optimum", "front", "neither", "optimum", "front"]
    line = toy.table([outcome], front).splitlines()[-1]
    assert line.startswith("| `rule` | ★ | ● | - | ★ | ● | 4/5 | 2/5 | 4,000 | -15.09, ")
    figure = toy.draw([outcome], front, 6)
    assert figure.axes[0].get_title() == "rule"


def test_rules_that_were_run_before_are_drawn_again(tmp_path, monkeypatch, capsys):
    def take(*arguments):
        monkeypatch.setattr(sys, "argv", ["toy_pareto", *arguments, "--steps", "60", "--out", str(tmp_path)])
        toy.main()
        return (tmp_path / "README.md").read_text()

    assert "| `mgda` |" in take("--rules", "mgda")
    (tmp_path / "README.md").write_text("Above.\n\n" + (tmp_path / "README.md").read_text() + "\nBelow.\n")
    text = take("--rules", "mean")
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| `")] == ["`mean`", "`mgda`"]
    assert text.startswith("Above.")
    assert text.endswith("Below.\n")
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "trajectories.npz", "toy_pareto.png"
    }  # fmt: skip
    assert "mean: " in capsys.readouterr().out
