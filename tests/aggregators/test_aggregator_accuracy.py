"""The accuracy tables: every check accepts its rule, and rejects one that is slightly wrong."""

from __future__ import annotations

import dataclasses
import sys

import aggregator_accuracy as accuracy
import numpy as np
import pytest

from mtrl_imgrad.aggregators import AGGREGATORS

LABELS = accuracy.variants()


def call(label: str, scale: float = 1.0) -> accuracy.Given:
    rule = LABELS[label]
    return accuracy.call(rule, accuracy.course("conflict", 3, accuracy.CALLS if accuracy.remembers(rule) else 1), scale)


def check(label: str, given: accuracy.Given) -> accuracy.Error:
    return accuracy.CHECKS[label.split()[0]](given)


def measured(error: accuracy.Error) -> float:
    """The largest of what a check found."""
    return max(value for value in dataclasses.astuple(error) if value is not None)


def test_every_rule_has_a_check_and_every_choice_a_table():
    assert list(accuracy.CHECKS) == list(AGGREGATORS)
    assert {label.split()[0] for label in LABELS} == set(AGGREGATORS)
    assert {"imgrad host", "imgrad variant=eq9 device", "conicgrad mode=single_loop host", "nashmtl norm=own"} <= set(
        LABELS
    )
    assert {"alignedmtl scale_mode=rmse device", "famo variant=official_rl", "adatask combine=sum"} <= set(LABELS)


@pytest.mark.parametrize("label", LABELS)
def test_a_check_accepts_its_rule_at_every_scale(label):
    for scale in accuracy.SCALES:
        error = check(label, call(label, scale))
        assert error.angle is None or error.angle < 1e-8
        assert error.residual is None or error.residual < 1e-9
        assert measured(error) < 1e-5


@pytest.mark.parametrize("label", LABELS)
def test_a_check_rejects_a_direction_that_is_off_by_a_thousandth(label):
    given = call(label)
    off = 1e-3 * np.array([1.0, -1.0, 0.5])
    wrong = dataclasses.replace(given, weights=given.weights + off, direction=given.direction + off @ given.rows)
    assert measured(check(label, wrong)) > 1e-4


@pytest.mark.parametrize("label", LABELS)
def test_a_check_rejects_a_direction_that_is_too_long(label):
    given = call(label)
    wrong = dataclasses.replace(given, weights=1.01 * given.weights, direction=1.01 * given.direction)
    assert measured(check(label, wrong)) > 1e-3


@pytest.mark.parametrize("name", [name for name, rule in AGGREGATORS.items() if accuracy.remembers(rule())])
def test_a_check_sees_what_was_remembered(name):
    label = next(label for label in LABELS if label.split()[0] == name)
    given = call(label)
    first = accuracy.call(LABELS[label], given.jacobians[-1:].numpy())
    wrong = dataclasses.replace(given, weights=first.weights, direction=first.direction)
    assert measured(check(label, wrong)) > 1e-5


def test_the_angle_keeps_its_digits():
    given = call("mean")
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
