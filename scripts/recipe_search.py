"""Trains the entries of scripts/recipe_search.yaml, and collects what each of them reached.

    python scripts/recipe_search.py --jobs 2 --runs runs/recipe --out docs/results/recipe

An entry is a name, what it tries in words and in flags that differ from scripts/recipe_start.yaml, and its seeds, which
are others than those of the results. A run that was stopped goes on, a finished one is not run again. `curves.csv` is
the record: the success of every run, finished or not. Runs whose folders are here replace their rows where they got
as far, those of others stay. Whether a run is finished is known from its folder alone, so where the folders are not
here name the entries that are still to be run with `--only`. `table.md` has the mean after some numbers of updates.

Two runs share the two cores, one thread and one worker each, so that minutes are no measure; updates are.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import yaml

from mtrl_imgrad.report.diagnostics import elapsed_seconds
from mtrl_imgrad.run_folder import read_run_folder

ENTRIES = Path(__file__).with_suffix(".yaml")
START = Path(__file__).with_name("recipe_start.yaml")
TAGS = {"training": "rollout/success_rate/", "evaluation": "eval/success_rate/"}
"""Success of the episodes since the row before (horizon 200, actions sampled), and of the deterministic policy on a few
goals (horizon 500). `final` in the record is the evaluation of the end on all goals."""

COLUMNS: tuple[str, ...] = ("entry", "seed", "of", "step", "updates", "minutes", "task", "success")
Record: TypeAlias = dict[tuple[str, int], list[dict[str, str]]]
"""Rows of curves.csv, by entry and seed."""


@dataclass(frozen=True)
class Entry:
    """One thing that was tried.

    Attributes:
        name: of the row.
        flags: of `mtrl-imgrad train`.
        what: it tries, in a few words.
        seeds: of its runs.
    """

    name: str
    flags: str
    what: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """One run of an entry.

    Attributes:
        entry: what is tried.
        seed: of the run.
        folder: its run folder.
    """

    entry: Entry
    seed: int
    folder: Path

    def command(self, flags: Sequence[str]) -> list[str]:
        """Starts it, or goes on with it."""
        if (self.folder / "config.yaml").exists():
            own = ["--resume", str(self.folder)]
        else:
            own = ["--config", str(START), "--seed", str(self.seed), "--run-dir", str(self.folder)]
            own += shlex.split(self.entry.flags)
        return [sys.executable, "-m", "mtrl_imgrad", "train", *own, *flags]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def done(self) -> Path:
        return self.folder / "done"


@dataclass(frozen=True)
class Point:
    """Success at some moment of training.

    Attributes:
        step: simulator steps per task.
        updates: of the networks.
        minutes: wall clock of training, over all processes of the run.
        success: rate of each task.
    """

    step: int
    updates: int
    minutes: float
    success: dict[str, float]


def read_entries(path: Path) -> list[Entry]:
    return [
        Entry(name, plain.get("flags", ""), plain["what"], tuple(plain["seeds"]))
        for name, plain in yaml.safe_load(path.read_text()).items()
    ]


def read_points(folder: Path, kind: str) -> Iterator[Point]:
    """The success of a run so far in `training` or in each `evaluation`, or that of its `final` one."""
    if not (folder / "progress.csv").exists():
        return
    run = read_run_folder(folder)
    seconds = elapsed_seconds(run)
    if kind == "final":
        if (final := run.final_success) and run.progress:
            updates, minutes = int(run.progress["train/updates"][-1]), seconds[run.progress["step"][-1]] / 60
            rates = dict(zip(final.tasks, final.success[-1].tolist(), strict=True))
            yield Point(int(final.steps[-1]), updates, minutes, rates)
        return
    rates = {tag.removeprefix(TAGS[kind]): rate for tag, rate in run.progress.items() if tag.startswith(TAGS[kind])}
    for row, (step, updates) in enumerate(zip(run.progress["step"], run.progress["train/updates"], strict=True)):
        success = {task: float(rate[row]) for task, rate in rates.items() if np.isfinite(rate[row])}
        if success:
            yield Point(int(step), int(np.nan_to_num(updates)), seconds[float(step)] / 60, success)


def train_all(runs: Sequence[Run], jobs: int, flags: Sequence[str], until: float) -> None:
    """Start runs in their order, `jobs` at a time, none after `until` (seconds of `time.monotonic`)."""
    waiting, going = [run for run in runs if not run.done.exists()], dict[Run, subprocess.Popen[bytes]]()
    while (waiting and time.monotonic() < until) or going:
        while waiting and len(going) < jobs and time.monotonic() < until:
            run = waiting.pop(0)
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            with run.log.open("ab") as log:
                going[run] = subprocess.Popen(run.command(flags), stdout=log, stderr=log)
            print(f"{time.strftime('%H:%M')} {run.folder.name}", flush=True)
        time.sleep(1)
        for run, process in list(going.items()):
            if process.poll() is not None:
                del going[run]
                print(f"{time.strftime('%H:%M')} {run.folder.name} ended: {process.returncode}", flush=True)
                if process.returncode == 0:
                    run.done.touch()


def read_record(path: Path) -> Record:
    """The rows of curves.csv, run by run in their order; empty where there is none yet."""
    found: Record = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault((row["entry"], int(row["seed"])), []).append(row)
    return found


def rows_of(run: Run) -> Iterator[dict[str, str]]:
    """What curves.csv has of a run folder."""
    for kind in (*TAGS, "final"):
        for point in read_points(run.folder, kind):
            at = (point.step, point.updates, round(point.minutes, 2))
            for task, rate in point.success.items():
                values = (run.entry.name, run.seed, kind, *at, task, round(rate, 4))
                yield dict(zip(COLUMNS, map(str, values), strict=True))


def last_step(rows: Sequence[dict[str, str]]) -> int:
    return max((int(row["step"]) for row in rows), default=0)


def means(rows: Sequence[dict[str, str]], kind: str) -> dict[int, dict[str, float]]:
    """Success of each task after each number of updates."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["of"] == kind:
            found.setdefault(int(row["updates"]), {})[row["task"]] = float(row["success"])
    return found


def last(found: dict[int, dict[str, float]]) -> str:
    """Mean success at the newest of some points, and when that was."""
    return f"{statistics.mean(found[max(found)].values()):.2f} at {max(found):,}" if found else ""


def table_row(entry: Entry, seed: int, rows: Sequence[dict[str, str]], updates: Sequence[int]) -> str:
    """Mean success in training, in the last row before each number of updates and in the last of all, that of the last
    evaluation on a few goals and that of the one on all; and the tasks that the latter, or else the former, found
    wanting."""
    training, evaluation, final = (means(rows, kind) for kind in (*TAGS, "final"))
    reached = [max((at for at in training if at <= each), default=None) for each in updates]
    cells = [
        f"{statistics.mean(training[at].values()):.2f}" if at is not None and max(training) >= 0.95 * each else ""
        for at, each in zip(reached, updates, strict=True)
    ]
    newest = final or evaluation
    rates = newest[max(newest)] if newest else {}
    weak = ", ".join(f"{task.removesuffix('-v3')} {rate:.1f}" for task, rate in rates.items() if rate < 0.8)
    ends = [last(training), last(evaluation), last(final).split(" ")[0]]
    return f"| {' | '.join([entry.name, entry.what, str(seed), *cells, *ends, weak])} |"


def write_results(runs: Sequence[Run], updates: Sequence[int], out: Path) -> None:
    """Put the runs whose folders are here in the place of their rows in `curves.csv`, keep the rows of others, and make
    `table.md` of all."""
    out.mkdir(parents=True, exist_ok=True)
    record = read_record(out / "curves.csv")
    for run in runs:
        key, rows = (run.entry.name, run.seed), list(rows_of(run))
        if rows and last_step(rows) >= last_step(record.get(key, [])):  # never in place of more
            record[key] = rows
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for rows in record.values():
            writer.writerows(rows)
    head = ["entry", "what", "seed", *(f"{each:,}" for each in updates)]
    head += ["end of training", "last evaluation", "all goals", "tasks below 0.8"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    known = {(run.entry.name, run.seed): run.entry for run in runs}
    lines += [
        table_row(known[name, seed], seed, record[name, seed], updates)
        for name, seed in known
        if means(record.get((name, seed), []), "training")
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=Path, default=ENTRIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; 0 only collects")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"), help="folder of the run folders")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/recipe"), help="folder of curves.csv and table.md"
    )
    parser.add_argument(
        "--updates", type=int, nargs="+", default=[10_000, 20_000, 30_000, 40_000], help="columns of the table"
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of the entries to train; none means all")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="minutes after which no run is started")
    options, flags = parser.parse_known_args()
    entries = read_entries(options.entries)
    runs = [Run(entry, seed, options.runs / f"{entry.name}-s{seed}") for entry in entries for seed in entry.seeds]
    if options.jobs:
        if unknown := set(options.only) - {entry.name for entry in entries}:
            parser.error(f"--only: there is no entry {sorted(unknown)[0]!r}")
        chosen = [run for run in runs if not options.only or run.entry.name in options.only]
        train_all(chosen, options.jobs, flags, time.monotonic() + 60 * options.stop_after)
    write_results(runs, options.updates, options.out)


if __name__ == "__main__":
    main()
