"""`bench solvers`: every way solves the same problem, and the table follows from the rounds."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch

from mtrl_imgrad.aggregators import AGGREGATORS, ConicGrad
from mtrl_imgrad.bench.solver_references import CONE, KERNEL_RULES, Clarabel, slsqp
from mtrl_imgrad.bench.solvers import TORCHJD, as_json, measured_rules, options, random_gramian, ratio, table
from mtrl_imgrad.cli import main

MEASURED = {
    "seconds": {
        "10": {
            "cagrad": {
                "ours, host": {"gauss": [0.001, 0.002, 0.003], "shared": [0.003, 0.002, 0.003]},
                "clarabel": {"gauss": [0.001, 0.001, 0.001], "shared": [0.001, 0.001, 0.001]},
                "torchjd": {"gauss": [0.010, 0.010, 0.010], "shared": [0.010, 0.010, 0.010]},
            },
            "imgrad": {
                "ours, host": {"gauss": [0.002, 0.002, 0.002], "shared": [0.004, 0.004, 0.004]},
                "clarabel": {"gauss": [0.002, 0.002, 0.002], "shared": [0.002, 0.002, 0.002]},
            },
        }
    },
    "missing": ["torchjd is not installed: pip install 'torchjd[full]'"],
    "others": 0.25,
}


@pytest.mark.parametrize("family", ["gauss", "shared", "parallel", "conflict"])
@pytest.mark.parametrize("num_tasks", [2, 3, 10])
def test_every_way_finds_the_same_direction(num_tasks, family):
    gramian = torch.from_numpy(random_gramian(family, num_tasks, seed=2))
    factor = np.linalg.cholesky(gramian.numpy())
    calls, missing = options(num_tasks)
    assert missing == [] or all("installed" in line or "torchjd" in line for line in missing)
    compared = 0
    for (rule, way), call in calls.items():
        if rule in KERNEL_RULES and way not in ("ours, host", "torchjd"):
            given, expected = call(gramian), calls[rule, "ours, host"](gramian)
            given = np.asarray(getattr(given, "weights", given)) @ factor
            expected = expected.weights.numpy() @ factor  # pyright: ignore[reportAttributeAccessIssue]
            assert np.linalg.norm(given - expected) < 2e-3 * np.linalg.norm(expected), (rule, way)
            compared += 1
    assert compared >= 2 * len(KERNEL_RULES)


def test_the_cone_is_active_somewhere_and_answered_alike():
    gramian = torch.from_numpy(random_gramian("imbalanced", 3, seed=1))
    factor = np.linalg.cholesky(gramian.numpy())
    calls, _ = options(3)
    ours = ConicGrad(c=CONE).aggregate(gramian)
    assert ours.diagnostics["cos_theta"] < CONE
    expected = ours.weights.numpy() @ factor
    for way in ("clarabel", "slsqp"):
        given = np.asarray(calls["conicgrad", way](gramian)) @ factor
        assert np.linalg.norm(given - expected) < 2e-3 * np.linalg.norm(expected)


def test_clarabel_is_given_new_data_at_every_call():
    clarabel = Clarabel(3)
    for seed in (1, 2, 1):
        gramian = random_gramian("conflict", 3, seed)
        for norm, quadratic in ((0.3, 0.0), (0.0, 1.0)):
            weights = clarabel(gramian, gramian.mean(1), norm, quadratic)
            expected = slsqp(gramian, gramian.mean(1), norm, quadratic)
            np.testing.assert_allclose(weights, expected, atol=1e-4)


def test_every_rule_on_the_gramian_is_measured_and_on_both_routes_where_it_has_them():
    calls, _ = options(2)
    ours = {(rule, way) for rule, way in calls if way.startswith("ours")}
    assert measured_rules() == [name for name, rule in AGGREGATORS.items() if rule.needs == "gramian"]
    assert {rule for rule, _ in ours} == set(measured_rules())
    for rule in measured_rules():
        has_routes = "solver" in vars(AGGREGATORS[rule]())
        expected = {"ours, host", "ours, device"} if has_routes else {"ours"}
        assert {way for name, way in ours if name == rule} == expected
    assert set(KERNEL_RULES) | set(TORCHJD) <= set(measured_rules())


def test_torchjds_class_is_measured_beside_every_rule_that_it_has_one_for():
    pytest.importorskip("torchjd", reason="the extra torchjd is not installed")
    calls, missing = options(2)
    assert {rule for rule, way in calls if way == "torchjd"} == set(TORCHJD)
    assert missing == []


def test_what_is_not_installed_is_told_in_a_line(monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    calls, missing = options(2)
    assert {way for _, way in calls} == {"ours", "ours, host", "ours, device", "slsqp"}
    assert [line.split()[0] for line in missing] == ["clarabel", "torchjd"]


def test_a_ratio_is_the_median_over_families_of_the_medians_over_rounds():
    ways = MEASURED["seconds"]["10"]["cagrad"]
    assert ratio(ways["ours, host"], ways["clarabel"]) == pytest.approx(2.5)  # 2 and 3
    assert ratio(ways["ours, host"], ways["torchjd"]) == pytest.approx(0.25)


def test_the_table_has_a_line_per_way_with_ratios_first():
    title, *lines = (" ".join(line.split()) for line in table(MEASURED).splitlines())
    assert title == "K rule way x clarabel x its CAGrad x torchjd ms slowest family"
    assert lines[0] == "10 cagrad ours, host 2.50 2.50 0.25 2.500 shared 3.000"
    assert lines[3] == "10 imgrad ours, host 1.50 3.00 - 3.000 shared 4.000"
    assert lines[-2] == MEASURED["missing"][0]
    assert lines[-1].startswith("other programs used 0.2 of")


def test_json_has_every_round_and_what_it_was_measured_on():
    written = json.loads(as_json(MEASURED, {"tasks": [10]}))
    assert written["settings"] == {"tasks": [10]}
    assert written["seconds"] == MEASURED["seconds"]
    assert written["machine"]["versions"]["torch"] == torch.__version__


def test_the_command_measures_and_writes(tmp_path, capsys):
    assert main(["bench", "solvers", "--tasks", "2", "--repeats", "2", "--json", str(tmp_path / "figures.json")]) == 0
    said = capsys.readouterr().out
    assert "cagrad" in said
    written = json.loads((tmp_path / "figures.json").read_text())
    times = written["seconds"]["2"]["cagrad"]["ours, host"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in times.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks 1", "tasks: '1' is not allowed"),
        ("--repeats 0", "repeats: 0 is not between 1 and 100000"),
        ("--steps 3", "--steps"),
        ("--json nowhere/figures.json", "json: there is no folder nowhere"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "solvers", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 2
