"""What docs/results.md says is what the run folders beside it hold, and these are runs of the recipe as it is."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from mtrl_imgrad.cli import parse
from mtrl_imgrad.comparison.command import planned
from mtrl_imgrad.config import to_dict
from mtrl_imgrad.overlays import parse_config
from mtrl_imgrad.report.command import ReportOptions
from mtrl_imgrad.report.data import csv_files
from mtrl_imgrad.report.groups import select
from mtrl_imgrad.report.results import results
from mtrl_imgrad.run_description import read_config
from mtrl_imgrad.run_folder import read_run_folder

RESULTS = Path(__file__).parents[1] / "docs/results"
PAGE = RESULTS.with_suffix(".md").read_text()
FLAGS = {"mt10_laptop": [], "mt10_laptop_20000": ["--sac.steps", "160000", "--eval.every", "40000"]}
"""Folder of runs -> in what they differ from the recipe."""
FOLDERS = {group: sorted((RESULTS / group).glob("*-s*/")) for group in FLAGS}
THE_HOUR, SHORT = FOLDERS.values()


def table(heading: str) -> list[list[str]]:
    """The rows of a table of the page, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
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


def interval(row: dict[str, str]) -> str:
    value, low, high = (float(row[key]) for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def method_and_seed(folder: Path) -> list[str]:
    method, seed = folder.name.rsplit("-s", 1)
    return [f"`{method}`", seed]


@pytest.mark.parametrize("folder", [*THE_HOUR, *SHORT], ids=lambda folder: f"{folder.parent.name}/{folder.name}")
class TestEachRun:
    def test_it_differs_from_the_recipe_in_aggregator_seed_place_and_what_the_page_says(self, folder):
        method, seed = folder.name.rsplit("-s", 1)
        own = ["--aggregator", method, "--seed", seed, *FLAGS[folder.parent.name]]
        recipe = parse_config(["--config", "mt10_laptop", *own])
        found = read_config(folder)
        assert to_dict(replace(found, run_dir=recipe.run_dir)) == to_dict(recipe)

    def test_it_was_evaluated_at_its_last_step_once_on_every_goal(self, folder):
        rows = rows_of(folder, "eval.csv")
        run = read_run_folder(folder)
        assert {int(row["step"]) for row in rows} == {run.planned_steps}
        visited = [(row["task"], int(row["goal"])) for row in rows]
        assert sorted(visited) == sorted((task, goal) for task in run.tasks for goal in range(50))

    def test_nothing_in_it_names_a_place_on_the_machine(self, folder):
        for path in folder.iterdir():
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)\b", path.read_text()), path


def test_the_table_of_runs_has_every_run_with_its_success_and_minutes():
    expected = []
    for folder in THE_HOUR:
        successes = [float(row["success"]) for row in rows_of(folder, "eval.csv")]
        minutes = float(rows_of(folder, "progress.csv")[-1]["time/elapsed"]) / 60
        expected.append([*method_and_seed(folder), f"{sum(successes):.0f} of {len(successes)}", f"{minutes:.1f}"])
    assert table("Runs") == expected
    assert expected


def test_the_table_of_curves_has_every_evaluation_while_training():
    expected = []
    for folder in THE_HOUR:
        by_step: dict[int, list[float]] = {}
        for row in rows_of(folder, "eval_training.csv"):
            by_step.setdefault(int(row["step"]), []).append(float(row["success"]))
        assert list(by_step) == [80_000, 160_000, 240_000, 320_000, 400_000]
        expected.append([*method_and_seed(folder), *(f"{sum(x) / len(x):.2f}" for x in by_step.values())])
    assert table("Success while training") == expected


@pytest.mark.parametrize("group", FLAGS)
def test_the_report_beside_the_runs_is_the_report_on_them(group):
    for name, text in report_on(group).items():
        published = (RESULTS / f"{group}_report" / name).read_text()
        for row, expected in zip(cells(published), cells(text), strict=True):
            assert row == pytest.approx(expected), name


def test_the_table_of_the_short_comparison_is_that_of_its_report():
    report = {name: rows_in(text) for name, text in report_on("mt10_laptop_20000").items()}
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
                difference = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
        expected.append(
            [
                f"`{rule}`",
                *(interval(own[quantity]) for quantity in ("mean", "interquartile mean")),
                ", ".join(f"{sum(values) / len(values):.2f}" for values in seeds.values()),
                difference,
            ]
        )
    assert table("Five rules after 20,000 updates") == expected


def test_its_commands_are_accepted_and_the_comparisons_take_what_is_published_for_finished(tmp_path, monkeypatch):
    lines = PAGE.split("```bash\n")[1].split("```")[0].splitlines()
    train, _, *compare, report, short_report = (shlex.split(line, comments=True)[2:] for line in lines)
    assert to_dict(parse_config(train)) == to_dict(read_config(RESULTS / "mt10_laptop/imgrad-s1"))
    assert all(parse(ReportOptions, words, "report").runs for words in (report, short_report))
    monkeypatch.chdir(tmp_path)
    for (group, folders), words in zip(FOLDERS.items(), compare, strict=True):
        shutil.copytree(RESULTS / group, tmp_path / "runs" / group)
        states = {run.name: run.state() for run in planned(words)[1]}
        assert len(states) == 15
        assert {name for name, state in states.items() if state == "finished"} == {folder.name for folder in folders}
