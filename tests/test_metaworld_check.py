"""The check in Meta-World's own environments finds what evaluation found, and sees a success that was made up."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import metaworld_check
import pytest

from mtrl_imgrad import train
from mtrl_imgrad.overlays import parse_config

FLAGS = (
    "--benchmark.tasks reach-v3 drawer-close-v3 --benchmark.goals 3 --envs.workers 0 --network.width 8 --compile false "
    "--envs.action-repeat 3 --eval.horizon 100 --eval.every 0 --sac.steps 1200 --sac.warmup 900 --log.tensorboard false"
)
"""An action repeat that does not divide the horizon."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(parse_config([*FLAGS.split(), "--run-dir", str(folder)]))


def check(monkeypatch, capsys, *arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of the script."""
    monkeypatch.setattr(sys, "argv", ["metaworld_check.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        metaworld_check.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out.splitlines()


def test_returns_and_successes_are_those_of_evaluation(run, monkeypatch, capsys):
    code, lines = check(monkeypatch, capsys, str(run))
    assert code == 0
    assert len(lines) == 3
    for line in lines[:2]:
        assert "of 3 goals; success differs from eval.csv on 0" in line
        assert float(line.split("return by ")[1].split()[0]) < 0.01


def test_a_success_that_was_made_up_is_seen(run, monkeypatch, capsys):
    path = run / "eval.csv"
    original = path.read_text()
    rows = list(csv.reader(original.splitlines()))
    column = rows[0].index("success")
    rows[1][column] = str(1 - int(rows[1][column]))
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    code, lines = check(monkeypatch, capsys, str(run))
    path.write_text(original)
    assert code == 1
    assert "success differs from eval.csv on 1" in lines[0]


def test_other_goals_are_played_without_a_comparison_and_kept(run, monkeypatch, capsys, tmp_path):
    out = tmp_path / "unseen.csv"
    code, lines = check(monkeypatch, capsys, str(run), "--goal-seed", "99", "--goals", "2", "--out", str(out))
    assert code == 0
    assert all(line.endswith("of 2 goals") for line in lines[:2])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tasks = ("reach-v3", "drawer-close-v3")
    assert [(row["task"], row["goal"]) for row in rows] == [(task, goal) for task in tasks for goal in "01"]
    for task, line in zip(tasks, lines[:2], strict=True):
        assert float(line.split()[1]) == sum(int(row["success"]) for row in rows if row["task"] == task) / 2
