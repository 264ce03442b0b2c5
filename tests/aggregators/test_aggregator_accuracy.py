"""The accuracy tables: every check accepts its rule, and rejects one that is slightly wrong."""

from __future__ import annotations

import dataclasses
import sys

import aggregator_accuracy as accuracy
import numpy as np
import pytest
from oracles import coordinates

ROWS = coordinates(accuracy.gradients("conflict", 3, 1).numpy())
LABELS = accuracy.variants()


def measured(error: accuracy.Error) -> float:
    """The largest of what a check found."""
    return max(value for value in dataclasses.astuple(error) if value is not None)


@pytest.mark.parametrize("label", LABELS)
def test_a_check_accepts_its_rule_at_every_scale(label):
    check = accuracy.CHECKS.get(label.split()[0], accuracy.generic)
    for scale in accuracy.SCALES:
        error = check(accuracy.call(LABELS[label], ROWS, scale))
        assert error.angle is None or error.angle < 1e-8
        assert error.residual is None or error.residual < 1e-9
        assert measured(error) < 1e-5


@pytest.mark.parametrize("name", [name for name in accuracy.CHECKS if name in {label.split()[0] for label in LABELS}])
def test_a_check_rejects_a_direction_that_is_off_by_a_thousandth(name):
    rule = next(rule for label, rule in LABELS.items() if label.split()[0] == name)
    given = accuracy.call(rule, ROWS)
    weights = given.weights + 1e-3 * np.array([1.0, -1.0, 0.5])
    wrong = dataclasses.replace(given, weights=weights, direction=weights @ ROWS)
    assert measured(accuracy.CHECKS[name](wrong)) > 1e-4


def test_the_fall_back_rejects_a_rule_that_depends_on_scale_or_order():
    given = accuracy.call(LABELS["mean"], ROWS, 1e4)
    assert measured(accuracy.generic(given)) < 1e-12
    wrong = dataclasses.replace(given, direction=np.array([1.0, 0.5, 0.25]) @ ROWS)
    assert measured(accuracy.generic(wrong)) > 1e-3


def test_the_angle_keeps_its_digits():
    given = accuracy.call(LABELS["mean"], ROWS)
    off = 1e-9 * np.linalg.norm(given.direction)
    turned = given.direction + off * np.linalg.svd(given.direction[None])[2][1]
    error = accuracy.against(given, turned)
    assert error.angle == pytest.approx(0.5e-18, rel=1e-3)
    assert error.distance == pytest.approx(1e-9, rel=1e-3)


def test_the_worst_of_several_is_taken_by_measure():
    errors = [accuracy.Error(1e-3, None, 2.0), accuracy.Error(1e-2, 1e-5, 1.0), accuracy.Error()]
    assert accuracy.worst(errors) == accuracy.Error(1e-2, 1e-5, 2.0)
    assert accuracy.shown(accuracy.worst(errors)) == "1e-02 / 1e-05 / 2e+00"
    assert np.isnan(accuracy.worst([accuracy.Error(float("nan")), accuracy.Error(1.0)]).residual)


def test_tables_are_written(tmp_path, monkeypatch, capsys):
    out = tmp_path / "accuracy.md"
    monkeypatch.setattr(sys, "argv", ["accuracy", "--rules", "mean", "mgda", "--tasks", "2", "10", "--out", str(out)])
    accuracy.main()
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### mean",
        "### mgda host",
        "### mgda device",
    ]
    assert text.count("| lowrank |") == 3
