"""The search's script starts or goes on with what an entry says, and reports evaluations as they were."""

from __future__ import annotations

import csv
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
from recipe_search import ENTRIES, START, Entry, Run, main, read_entries, read_points, train_all, write_results
from written_runs import write_run

from mtrl_imgrad.config import to_dict
from mtrl_imgrad.overlays import parse_config
from mtrl_imgrad.precision import PRODUCT_DTYPES
from mtrl_imgrad.run_description import read_config
from mtrl_imgrad.run_folder import read_run_folder

PUBLISHED = Path(__file__).parents[1] / "docs/results/recipe"
TASKS = ("reach-v3", "push-v3")


def written_run(
    folder: Path,
    rows: Sequence[tuple[int, int, float, float | None]],
    starts: Sequence[int] = (0,),
    final: Mapping[str, int] | None = None,
) -> None:
    """A run with rows of step, updates, elapsed seconds and, where evaluated, the first task's success; the second task
    never succeeds. In training both have half of the first's success. `final` is how many of 10 goals were reached at
    the end, by task."""
    progress = []
    for step, updates, elapsed, success in rows:
        rates = (nan, nan, nan, nan) if success is None else (success, 0.0, success / 2, success / 2)
        tags = [f"{part}/success_rate/{task}" for part in ("eval", "rollout") for task in TASKS]
        row = {"step": step, "train/updates": updates, "time/elapsed": elapsed}
        progress.append(row | dict(zip(tags, rates, strict=True)))
    write_run(folder, tasks=TASKS, progress=progress, starts=starts, final=final, steps=rows[-1][0])


def test_minutes_count_over_all_processes_of_a_resumed_run(tmp_path):
    written_run(
        tmp_path / "run",
        [(100, 10, 60.0, 0.5), (200, 20, 90.0, None), (300, 30, 95.0, None), (400, 40, 120.0, 1.0)],
        starts=(0, 200),
    )
    points = list(read_points(tmp_path / "run", "evaluation"))
    assert [(point.step, point.updates, point.minutes, list(point.success.values())) for point in points] == [
        (100, 10, 1.0, [0.5, 0.0]),
        (400, 40, 3.5, [1.0, 0.0]),
    ]


def test_a_run_without_rows_has_no_points(tmp_path):
    assert list(read_points(tmp_path, "training")) == []


def test_the_table_has_what_was_evaluated_by_then_and_only_of_runs_that_got_there(tmp_path, capsys):
    rows = [(step, step // 10, step / 10, rate) for step, rate in ((100, 0.2), (200, 0.4), (300, 0.6), (400, 0.8))]
    written_run(tmp_path / "long-s11", rows, final={"reach-v3": 9, "push-v3": 4})
    written_run(tmp_path / "short-s11", rows[:2])
    entries = [Entry("long", "--sac.tau 0.1", "what", (11,)), Entry("short", "", "what", (11, 12))]
    runs = [Run(entry, seed, tmp_path / f"{entry.name}-s{seed}") for entry in entries for seed in entry.seeds]
    write_results(runs, [10, 25, 40], tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines == (tmp_path / "out/table.md").read_text().splitlines()
    cells = [line.split(" | ")[1:9] for line in lines[2:]]
    assert cells == [
        ["what", "11", "0.10", "0.20", "0.40", "0.40 at 40", "0.40 at 40", "0.65"],
        ["what", "11", "0.10", "", "", "0.20 at 20", "0.20 at 20", ""],
    ]
    assert lines[2].endswith("| push 0.4 |")
    assert lines[3].endswith("| reach 0.4, push 0.0 |")
    with (tmp_path / "out/curves.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 * 2 * (4 + 2) + 2
    columns = ("entry", "seed", "of", "step", "updates", "minutes", "task", "success")
    first = ("long", "11", "training", "100", "10", "0.17", "reach-v3", "0.1")
    assert found[0] == dict(zip(columns, first, strict=True))
    assert found[8]["of"] == "evaluation"
    assert found[8]["success"] == "0.2"
    assert [tuple(row.values()) for row in found if row["of"] == "final"] == [
        ("long", "11", "final", "400", "40", "0.67", "reach-v3", "0.9"),
        ("long", "11", "final", "400", "40", "0.67", "push-v3", "0.4"),
    ]


def test_rows_of_runs_that_are_not_here_stay_and_those_of_runs_that_are_here_are_renewed(tmp_path, capsys):
    entry = Entry("one", "", "what", (11, 12))
    runs = [Run(entry, seed, tmp_path / f"one-s{seed}") for seed in entry.seeds]
    for run in runs:
        written_run(run.folder, [(100, 10, 60.0, 0.4)])
    write_results(runs, [10], tmp_path / "out")
    before = (tmp_path / "out/curves.csv").read_text()
    shutil.rmtree(runs[0].folder)
    written_run(runs[0].folder, [(50, 5, 30.0, 1.0)])  # begun anew, and not as far yet
    write_results(runs, [10], tmp_path / "out")
    assert (tmp_path / "out/curves.csv").read_text() == before
    shutil.rmtree(runs[1].folder)
    written_run(runs[1].folder, [(100, 10, 60.0, 0.4), (200, 20, 120.0, 0.8)])
    capsys.readouterr()
    write_results(runs, [10], tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split(" | ")[-5:-2] for line in lines[2:]]
    assert cells == [["0.20", "0.20 at 10", "0.20 at 10"], ["0.20", "0.40 at 20", "0.40 at 20"]]
    assert (tmp_path / "out/curves.csv").read_text().startswith(before[: before.index("one,12")])


def test_the_published_record_and_its_table_are_those_of_the_published_runs(tmp_path, monkeypatch):
    shutil.copy(PUBLISHED / "curves.csv", tmp_path)
    runs = str(PUBLISHED / "runs")  # of the later entries; of the others there are only their rows in the record
    monkeypatch.setattr(sys, "argv", ["recipe_search.py", "--jobs", "0", "--runs", runs, "--out", str(tmp_path)])
    main()
    assert (tmp_path / "curves.csv").read_text() == (PUBLISHED / "curves.csv").read_text()
    table = (tmp_path / "table.md").read_text()
    assert table == (PUBLISHED / "table.md").read_text()
    assert f"<!-- table -->\n{table}" in (PUBLISHED.parent.with_name("recipe.md")).read_text()


@pytest.mark.parametrize("folder", sorted((PUBLISHED / "runs").iterdir()), ids=lambda folder: folder.name)
def test_a_published_run_is_one_of_its_entry(folder):
    (run,) = (
        run
        for entry in read_entries(ENTRIES)
        for run in (Run(entry, seed, Path(f"{entry.name}-s{seed}")) for seed in entry.seeds)
        if run.folder.name == folder.name
    )
    command = run.command(["--log.every", "8000", "--threads", "1", "--envs.workers", "1"])
    expected = parse_config([*command[4:], "--run-dir", f"runs/recipe/{folder.name}"])
    assert to_dict(read_config(folder)) == to_dict(expected)


def test_the_table_of_the_ablation_is_that_of_the_published_runs():
    pieces = ("no-start", "white-noise", "no-floor", "raw-rewards")
    entries = ("recipe", *(f"recipe-{piece}" for piece in pieces))
    finals = [[final_success(f"{entry}-s{seed}") for seed in (12, 13)] for entry in entries]
    rows = {task: [[final[task] for final in both] for both in finals] for task in finals[0][0]}
    rows["mean"] = [[sum(final.values()) / len(final) for final in both] for both in finals]
    expected = [[task, *(", ".join(f"{rate:.2f}" for rate in both) for both in rates)] for task, rates in rows.items()]
    page = PUBLISHED.parent.with_name("recipe.md").read_text()
    lines = page.split("<!-- ablation -->\n")[1].split("\n\n")[0].splitlines()
    found = [line.strip("| ").split(" | ") for line in lines]
    assert found[0] == ["task", *(f"`{entry}`" for entry in entries)]
    assert found[2:] == expected


def final_success(name: str) -> dict[str, float]:
    """Success on all goals of each task at the end of a published run."""
    final = read_run_folder(PUBLISHED / "runs" / name).final_success
    assert final
    return dict(zip(final.tasks, final.success[-1].tolist(), strict=True))


def test_the_entry_of_the_recipe_is_the_recipe():
    (entry,) = (entry for entry in read_entries(ENTRIES) if entry.name == "recipe")
    tried = parse_config(["--config", str(START), *shlex.split(entry.flags)])
    frozen = parse_config(["--config", "mt10_laptop"])
    assert replace(tried.sac, steps=frozen.sac.steps) == frozen.sac
    assert replace(tried.envs, workers=frozen.envs.workers) == frozen.envs
    assert PRODUCT_DTYPES[tried.precision] == PRODUCT_DTYPES[frozen.precision]
    for part in ("benchmark", "network", "replay", "aggregator", "algorithm"):
        assert getattr(tried, part) == getattr(frozen, part), part


@pytest.mark.parametrize("entry", read_entries(ENTRIES), ids=lambda entry: entry.name)
def test_every_entry_is_a_configuration_and_uses_no_seed_of_the_results(entry):
    command = Run(entry, entry.seeds[0], Path("runs/new")).command(["--threads", "1"])
    assert command[:4] == [sys.executable, "-m", "mtrl_imgrad", "train"]
    folder = command.index("--run-dir")
    config = parse_config(command[4:folder] + command[folder + 2 :])
    assert (config.seed, config.threads, config.benchmark.tasks) == (entry.seeds[0], 1, ("MT10",))
    start = parse_config(["--config", str(START), *shlex.split(entry.flags)])
    assert (config.sac, config.envs, config.aggregator) == (start.sac, start.envs, start.aggregator)
    assert not {1, 2, 3} & set(entry.seeds)


def test_runs_are_trained_resumed_or_left_alone(tmp_path):
    """Three tiny runs of real tasks: one is finished already, one is to be resumed, one is new."""
    flags = (
        "--benchmark.tasks reach-v3 push-v3 --envs.workers 0 --envs.pipeline false --network.width 8 --compile false"
    )
    tiny = Entry(
        "tiny", f"{flags} --sac.steps 1600 --sac.warmup 800 --eval.every 800 --eval.goals-per-task 1", "", (11,)
    )
    new, old, done = (Run(tiny, 11, tmp_path / name / "run") for name in ("new", "old", "done"))
    train_all([new], 1, ["--eval.final", "false"], float("inf"))
    assert new.done.exists()
    assert [point.step for point in read_points(new.folder, "evaluation")] == [800, 1600]
    done.folder.mkdir(parents=True)
    done.done.touch()
    new.folder.parent.rename(tmp_path / "moved")
    old.folder.parent.mkdir()
    (tmp_path / "moved/run").rename(old.folder)
    old.done.unlink()
    train_all([done, old], 2, ["--sac.steps", "2400"], float("inf"))
    assert old.done.exists()
    assert [point.step for point in read_points(old.folder, "evaluation")] == [800, 1600, 2400]
    assert not (done.folder / "config.yaml").exists()


def test_a_failed_run_is_tried_again_and_nothing_starts_after_the_given_time(tmp_path):
    run = Run(Entry("wrong", "--sac.steps 0", "", (11,)), 11, tmp_path / "run")
    train_all([run], 1, [], float("inf"))
    assert not run.done.exists()
    assert "sac.steps" in run.log.read_text()
    size = run.log.stat().st_size
    train_all([run], 1, [], float("-inf"))
    assert run.log.stat().st_size == size
