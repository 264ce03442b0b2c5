"""What docs/results.md says is what the run folders beside it hold, and these are runs of the recipe as it is."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mtrl_imgrad.cli import parse
from mtrl_imgrad.comparison.command import planned
from mtrl_imgrad.config import to_dict
from mtrl_imgrad.overlays import parse_config
from mtrl_imgrad.report.command import ReportOptions
from mtrl_imgrad.run_description import read_config
from mtrl_imgrad.run_folder import read_run_folder

ROOT = Path(__file__).parents[1]
FOLDERS = sorted((ROOT / "docs/results/mt10_laptop").glob("*-s*/"))
PAGE = (ROOT / "docs/results.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of a table of the page, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def method_and_seed(folder: Path) -> list[str]:
    method, seed = folder.name.rsplit("-s", 1)
    return [f"`{method}`", seed]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestEachRun:
    def test_it_differs_from_the_recipe_in_aggregator_seed_and_place_alone(self, folder):
        method, seed = folder.name.rsplit("-s", 1)
        recipe = parse_config(["--config", "mt10_laptop", "--aggregator", method, "--seed", seed])
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
    for folder in FOLDERS:
        successes = [float(row["success"]) for row in rows_of(folder, "eval.csv")]
        minutes = float(rows_of(folder, "progress.csv")[-1]["time/elapsed"]) / 60
        expected.append([*method_and_seed(folder), f"{sum(successes):.0f} of {len(successes)}", f"{minutes:.1f}"])
    assert table("Runs") == expected
    assert expected


def test_the_table_of_curves_has_every_evaluation_while_training():
    expected = []
    for folder in FOLDERS:
        by_step: dict[int, list[float]] = {}
        for row in rows_of(folder, "eval_training.csv"):
            by_step.setdefault(int(row["step"]), []).append(float(row["success"]))
        assert list(by_step) == [80_000, 160_000, 240_000, 320_000, 400_000]
        expected.append([*method_and_seed(folder), *(f"{sum(x) / len(x):.2f}" for x in by_step.values())])
    assert table("Success while training") == expected


def test_its_commands_are_accepted_and_the_comparison_takes_what_is_published_for_finished(tmp_path, monkeypatch):
    commands = [shlex.split(line, comments=True) for line in PAGE.split("```bash\n")[1].split("```")[0].splitlines()]
    train, _, compare, report = (words[2:] for words in commands)
    assert to_dict(parse_config(train)) == to_dict(read_config(ROOT / "docs/results/mt10_laptop/imgrad-s1"))
    assert parse(ReportOptions, report, "report").runs
    monkeypatch.chdir(tmp_path)
    for folder in FOLDERS:
        shutil.copytree(folder, tmp_path / "runs/mt10_laptop" / folder.name)
    states = {run.name: run.state() for run in planned(compare)[1]}
    assert len(states) == 15
    assert {name for name, state in states.items() if state == "finished"} == {folder.name for folder in FOLDERS}
