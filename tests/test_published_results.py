"""What docs/results.md and the README say of MT10 is what the run folders hold, and these are runs of the recipe as it
is, by the commands on the page."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import metaworld_check
import numpy as np
import pytest
from scipy import stats

from mtrl_imgrad.cli import EvaluateOptions, parse
from mtrl_imgrad.comparison.command import planned
from mtrl_imgrad.config import to_dict
from mtrl_imgrad.kept_checkpoints import choose_checkpoint
from mtrl_imgrad.overlays import parse_config
from mtrl_imgrad.record import RecordOptions
from mtrl_imgrad.report.command import ReportOptions
from mtrl_imgrad.report.data import csv_files
from mtrl_imgrad.report.diagnostics import Cost, cost
from mtrl_imgrad.report.groups import select
from mtrl_imgrad.report.results import results
from mtrl_imgrad.run_description import read_config
from mtrl_imgrad.run_folder import read_run_folder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
PAGE = RESULTS.with_suffix(".md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
COMPARISONS = {
    runs[0].folder.parent.name: runs
    for runs in (planned(shlex.split(line, comments=True)[2:])[1] for line in COMMANDS if " compare " in line)
}
"""Folder of runs -> the runs that the page's command for it trains, published or not."""
FOLDERS = {group: sorted((RESULTS / group).glob("*-s*/")) for group in COMPARISONS}
RECIPE, SHORT, SB3, POLICY = FOLDERS.values()
REPORTED = list(FOLDERS)[:3]
"""Groups of runs with a report beside them; the last one is a single run, there for its checkpoint."""
NOTED = dict.fromkeys(("imgrad-s1", "imgrad-s2", "imgrad-s3", "mean-s1"), "EPYC 7003") | {"mean-s2": "Xeon"}
NOTED |= dict.fromkeys(("mean-s3", "sb3-sac-s1", "sb3-sac-s2", "sb3-sac-s3"), "EPYC 9004")
NOTED |= {f"{rule}-s{seed}": "EPYC 9005" for rule in ("pcgrad", "cagrad", "conicgrad") for seed in (1, 2, 3)}
"""Processors of runs that began before versions.json had them or told generations of one name apart, as noted when they
ran."""


def table(heading: str, page: str = PAGE) -> list[list[str]]:
    """The rows of the first table under a heading, without its head."""
    section = re.split(r"\n##+ ", page.split(f"## {heading}\n")[1])[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def rows_in(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    return rows_in((folder / name).read_text())


def cells(text: str) -> list[list[str | float]]:
    return [[number(cell) for cell in row] for row in csv.reader(text.splitlines())]


def number(cell: str) -> str | float:
    try:
        return float(cell)
    except ValueError:
        return cell


@cache
def report_on(group: str) -> dict[str, str]:
    """The CSV files of a report on the runs of a group."""
    return csv_files(results(select([read_run_folder(folder) for folder in FOLDERS[group]])))


def interval(row: dict[str, str], digits: int = 2) -> str:
    value = f"{float(row['value']):.{digits}f}"
    return f"{value} [{float(row['low']):.{digits}f}, {float(row['high']):.{digits}f}]" if row["low"] else value


def method_and_seed(folder: Path) -> list[str]:
    method, seed = folder.name.rsplit("-s", 1)
    return [f"`{method}`", seed]


def cost_of(folder: Path) -> Cost:
    taken = cost(read_run_folder(folder))
    assert taken
    return taken


def won_and_minutes(folder: Path) -> tuple[str, str]:
    """Episodes with success in the final evaluation, and wall-clock minutes of training."""
    successes = [float(row["success"]) for row in rows_of(folder, "eval.csv")]
    assert len(successes) == 500
    return f"{sum(successes):.0f}", f"{cost_of(folder).minutes:.1f}"


@pytest.mark.parametrize(
    "folder", [*chain(*FOLDERS.values())], ids=lambda folder: f"{folder.parent.name}/{folder.name}"
)
class TestEachRun:
    def test_it_is_a_run_of_the_command_on_the_page(self, folder):
        (run,) = (run for run in COMPARISONS[folder.parent.name] if run.name == folder.name)
        found = read_config(folder)
        envs = replace(found.envs, workers=run.config.envs.workers)  # which, like the place, changes no number
        assert to_dict(replace(found, run_dir="", envs=envs)) == to_dict(run.config)

    def test_it_was_evaluated_at_its_last_step_once_on_every_goal(self, folder):
        rows = rows_of(folder, "eval.csv")
        run = read_run_folder(folder)
        assert {int(row["step"]) for row in rows} == {run.planned_steps}
        visited = [(row["task"], int(row["goal"])) for row in rows]
        assert sorted(visited) == sorted((task, goal) for task in run.tasks for goal in range(50))

    def test_nothing_in_it_names_a_place_on_the_machine(self, folder):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)\b", path.read_text()), path


def test_the_table_of_runs_has_every_run_with_its_success_and_what_it_took():
    expected = []
    for folder in (*RECIPE, *SB3):
        won, minutes = won_and_minutes(folder)
        expected.append([*method_and_seed(folder), f"{won} of 500", minutes, f"{cost_of(folder).update_ms:.0f}"])
    found = table("Runs")
    assert [row[:-1] for row in found] == expected
    for row, folder in zip(found, (*RECIPE, *SB3), strict=True):
        assert row[-1] == NOTED[folder.name]
        recorded = read_run_folder(folder).package("processor")
        assert recorded == "unknown" or (recorded, row[-1][:4]) == ("AMD EPYC", "EPYC")


def test_the_readme_has_the_same_runs():
    expected: dict[str, list[list[str]]] = {}
    for folder in (*RECIPE, *SB3):
        method, seed = method_and_seed(folder)
        expected.setdefault(method, []).append([seed, *won_and_minutes(folder)])
    found = {method: cells for method, *cells in table("MT10 on two CPU cores", (ROOT / "README.md").read_text())}
    assert found == {
        method: [", ".join(cells) for cells in zip(*rows, strict=True)] for method, rows in expected.items()
    }


def test_the_table_of_tasks_has_their_mean_over_the_seeds():
    rates: dict[str, dict[str, list[float]]] = {}
    for folder in (*RECIPE, *SB3):
        for row in rows_of(folder, "eval.csv"):
            of_task = rates.setdefault(row["task"], {})
            of_task.setdefault(method_and_seed(folder)[0], []).append(float(row["success"]))
    expected = [[f"`{task}`", *(f"{np.mean(x):.2f}" for x in by.values())] for task, by in rates.items()]
    assert table("Tasks") == expected


def test_the_table_of_curves_has_every_evaluation_while_training():
    expected = []
    for folder in RECIPE:
        curve = read_run_folder(folder).training_curve
        assert curve
        assert list(curve.steps) == [80_000, 160_000, 240_000, 320_000, 400_000]
        after_20_000 = zip(curve.tasks, curve.success[1], strict=True)
        weak = ", ".join(f"`{task.removesuffix('-v3')}`" for task, rate in after_20_000 if rate < 0.8)
        expected.append([*method_and_seed(folder), *(f"{row.mean():.2f}" for row in curve.success), weak])
    assert table("Success while training") == expected


@pytest.mark.parametrize("group", REPORTED)
def test_the_report_beside_the_runs_is_the_report_on_them(group):
    for name, text in report_on(group).items():
        published = (RESULTS / f"{group}_report" / name).read_text()
        for row, expected in zip(cells(published), cells(text), strict=True):
            assert row == pytest.approx(expected), name


@pytest.mark.parametrize("group", REPORTED)
def test_the_command_on_the_page_may_replace_the_report(group):
    """`report` replaces only a folder in which there is nothing but what it wrote."""
    folder = RESULTS / f"{group}_report"
    written = json.loads((folder / "report.json").read_text())["files"]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there <= {*written, "report.json"}


@pytest.mark.parametrize(
    ("group", "heading", "digits"),
    [("mt10_laptop", "Five rules to the end", 3), ("mt10_laptop_20000", "Five rules after 20,000 updates", 2)],
)
def test_the_table_of_five_rules_is_that_of_the_report(group, heading, digits):
    report = {name: rows_in(text) for name, text in report_on(group).items()}
    expected = []
    for rule in ("cagrad", "conicgrad", "imgrad", "mean", "pcgrad"):
        own = {row["quantity"]: row for row in report["estimates.csv"] if row["group"] == rule}
        seeds: dict[str, list[float]] = {}
        for row in report["final.csv"]:
            if row["group"] == rule:
                seeds.setdefault(row["seed"], []).append(float(row["success"]))
        difference = "-"
        for row in report["pairs.csv"]:
            if row["quantity"] == "difference by seed" and {row["a"], row["b"]} == {rule, "mean"}:
                ends = [float(row[key]) for key in ("value", "low", "high")]
                value, low, high = ends if row["b"] == "mean" else (-ends[0], -ends[2], -ends[1])
                difference = f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        expected.append(
            [
                f"`{rule}`",
                *(interval(own[quantity], digits) for quantity in ("mean", "interquartile mean")),
                ", ".join(f"{sum(values) / len(values):.{digits}f}" for values in seeds.values()),
                difference,
            ]
        )
    assert table(heading) == expected


def test_the_table_of_weights_has_the_medians_of_the_second_half():
    hard = ("push-v3", "pick-place-v3", "peg-insert-side-v3")
    expected = []
    for rule in ("cagrad", "conicgrad", "imgrad", "mean", "pcgrad"):
        rows = [row for seed in (1, 2, 3) for row in rows_of(RESULTS / f"mt10_laptop/{rule}-s{seed}", "progress.csv")]
        late = [row for row in rows if int(row["step"]) > 200_000]
        of_reach, of_hard = [], []
        for part in ("critic", "actor"):
            first = f"gradients/{part}/weight/"
            tasks = [column.removeprefix(first) for column in late[0] if column.startswith(first)]
            assert len(tasks) == 10
            weight, norm = (
                np.array([[float(row[f"gradients/{part}/{name}/{task}"]) for task in tasks] for row in late])
                for name in ("weight", "norm")
            )
            reach = tasks.index("reach-v3")
            assert (norm.argmin(1) == reach).all(), "its gradients are the smallest with every rule"
            lengths = weight * norm / (weight * norm).sum(1, keepdims=True)
            of_reach += [np.median(weight[:, reach] / weight.sum(1)), np.median(lengths[:, reach])]
            of_hard.append(np.median(lengths[:, [tasks.index(task) for task in hard]].sum(1)))
        expected.append([f"`{rule}`", *(f"{share:.2f}" for share in (*of_reach, *of_hard))])
    assert table("Where the weight goes") == expected


def test_probabilities_of_improvement_that_exclude_one_half_are_named():
    told = 0
    for row in rows_in(report_on("mt10_laptop")["pairs.csv"]):
        if row["quantity"] != "probability of improvement" or not row["low"]:
            continue
        value, low, high = (float(row[key]) for key in ("value", "low", "high"))
        if low > 0.5 or high < 0.5:
            ends = (value, low, high) if value > 0.5 else (1 - value, 1 - high, 1 - low)
            assert "ConicGrad {:.2f} [{:.2f}, {:.2f}]".format(*ends) in PAGE
            told += 1
    assert told == 2


def test_stable_baselines3s_interval_is_that_of_its_report_and_the_difference_to_it_is_that_of_the_seeds():
    (row,) = (row for row in rows_in(report_on("mt10_laptop_sb3")["estimates.csv"]) if row["quantity"] == "mean")
    assert f"{len(SB3)} seeds: {interval(row)}" in PAGE
    success = {folder.name: int(won_and_minutes(folder)[0]) / 500 for folder in (*RECIPE, *SB3)}
    theirs = np.array([success[folder.name] for folder in SB3])
    ours = np.array([success[folder.name.replace("sb3-sac", "imgrad")] for folder in SB3])
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert f"by seed: {(ours - theirs).mean():+.2f} [{low:+.2f}, {high:+.2f}]" in PAGE
    curves = [read_run_folder(folder).training_curve for folder in SB3]
    late = np.mean([curve.success[curve.steps >= 800_000].mean(1) for curve in curves if curve], 0)
    assert f"after 800,000 steps ({', '.join(f'{rate:.2f}' for rate in late)} on average)" in PAGE


def test_the_other_commands_are_accepted_and_make_what_is_published():
    """Those that are no `compare`."""
    trains = [shlex.split(line, comments=True)[2:] for line in COMMANDS if " train " in line]
    assert [to_dict(parse_config(words)) for words in trains] == [
        to_dict(read_config(RESULTS / "mt10_laptop/imgrad-s1"))
    ]
    reports = [
        parse(ReportOptions, shlex.split(line, comments=True)[2:], "report") for line in COMMANDS if " report " in line
    ]
    assert [(options.runs, options.out) for options in reports] == [
        ((Path(f"docs/results/{group}"),), Path(f"docs/results/{group}_report")) for group in REPORTED
    ]


def test_a_comparison_takes_what_is_published_for_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for group, folders in FOLDERS.items():
        shutil.copytree(RESULTS / group, tmp_path / "runs" / group)
        states = {run.name: run.state() for run in COMPARISONS[group]}
        assert {name for name, state in states.items() if state == "finished"} == {folder.name for folder in folders}


class TestTheRunWithACheckpoint:
    """It is seed 1 of IMGrad once more, on the processor of the short runs."""

    def test_the_page_says_what_it_reached(self):
        won, minutes = won_and_minutes(POLICY[0])
        assert f"{won} of 500 in {minutes} minutes" in PAGE
        place = choose_checkpoint(POLICY[0]).place
        assert f"{sum(path.stat().st_size for path in place.iterdir()) / 1e6:.1f} MB" in PAGE
        assert f"the run of the last one took {minutes} minutes" in PAGE
        text = re.sub(r"\s+", " ", PAGE)
        unseen, other = (
            [int(row["success"]) for row in rows_of(folder, "unseen_goals.csv")]
            for folder in (POLICY[0], RESULTS / "mt10_laptop/mean-s3")
        )
        assert (len(unseen), len(other)) == (500, 500)
        assert f"{sum(unseen)} of 500 on goals that training had not seen" in text
        assert f"solved {sum(unseen)} of 500, that of `mean` 3 {sum(other)}" in text

    def test_the_commands_for_it_are_accepted(self):
        for command, options in (("evaluate", EvaluateOptions), ("record", RecordOptions)):
            (line,) = (line for line in COMMANDS if f"mtrl-imgrad {command}" in line)
            run = parse(options, shlex.split(line, comments=True)[2:], command).run
            assert RESULTS / run.relative_to("runs") == POLICY[0]

    def test_it_began_as_the_short_run_did_bit_for_bit(self):
        short = [folder for folder in SHORT if folder.name == POLICY[0].name]
        long, short = (rows_of(folder, "progress.csv") for folder in (POLICY[0], *short))
        for one, other in zip(long[: len(short)], short, strict=True):
            clock = [column for column in one if column.startswith(("time/", "eval/"))]
            assert {**one, **dict.fromkeys(clock)} == {**other, **dict.fromkeys(clock)}

    def test_its_policy_does_in_metaworlds_environments_what_the_evaluation_says(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["metaworld_check.py", str(POLICY[0]), "--goals", "1"])
        with pytest.raises(SystemExit) as ended:
            metaworld_check.main()
        assert ended.value.code == 0, capsys.readouterr().out
