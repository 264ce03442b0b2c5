"""Trains the entries of scripts/recipe_search.yaml, and collects what each of them reached.

    python scripts/recipe_search.py --jobs 2 --runs runs/recipe --out docs/results/recipe

An entry is a name, the flags in which it differs from configs/mt10_laptop.yaml, why it was tried, and its seeds, which
are others than those of the results. A run that was stopped goes on, a finished one is not run again. `curves.csv` has
every evaluation of every run, finished or not; `table.md` their success at some minutes of training.
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

import yaml

ENTRIES = Path(__file__).with_suffix(".yaml")
TAG = "eval/success_rate/"


@dataclass(frozen=True)
class Entry:
    """One thing that was tried.

    Attributes:
        name: of the row.
        flags: of `mtrl-imgrad train`.
        why: what it was expected to do.
        seeds: of its runs.
    """

    name: str
    flags: str
    why: str
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
            own = ["--config", "mt10_laptop", "--seed", str(self.seed), "--run-dir", str(self.folder)]
            own += shlex.split(self.entry.flags)
        return [sys.executable, "-m", "mtrl_imgrad", "train", *own, *flags]

    def finished(self) -> bool:
        return (self.folder / "done").exists()


@dataclass(frozen=True)
class Point:
    """One evaluation during training.

    Attributes:
        step: simulator steps per task.
        minutes: wall clock since the process started, over all processes of the run.
        success: rate of each task.
    """

    step: int
    minutes: float
    success: dict[str, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.success.values())


def read_entries(path: Path) -> list[Entry]:
    return [
        Entry(name, plain.get("flags", ""), plain["why"], tuple(plain["seeds"]))
        for name, plain in yaml.safe_load(path.read_text()).items()
    ]


def read_points(run: Path) -> Iterator[Point]:
    """The evaluations of a run so far."""
    path = run / "progress.csv"
    if not path.exists():
        return
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            success = {tag.removeprefix(TAG): float(rate) for tag, rate in row.items() if tag.startswith(TAG) and rate}
            if success:
                yield Point(int(row["step"]), float(row["time/elapsed"]) / 60, success)


def train_all(runs: Sequence[Run], jobs: int, flags: Sequence[str], until: float) -> None:
    """Start runs in their order, `jobs` at a time, none after `until` (seconds of `time.monotonic`)."""
    waiting, going = [run for run in runs if not run.finished()], dict[Run, subprocess.Popen[bytes]]()
    while (waiting and time.monotonic() < until) or going:
        while waiting and len(going) < jobs and time.monotonic() < until:
            run = waiting.pop(0)
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            with run.folder.with_suffix(".log").open("ab") as log:
                going[run] = subprocess.Popen(run.command(flags), stdout=log, stderr=log)
            print(f"{time.strftime('%H:%M')} {run.folder.name}", flush=True)
        time.sleep(1)
        for run, process in list(going.items()):
            if process.poll() is not None:
                del going[run]
                print(f"{time.strftime('%H:%M')} {run.folder.name} ended: {process.returncode}", flush=True)
                if process.returncode == 0:
                    (run.folder / "done").touch()


def write_results(runs: Sequence[Run], minutes: Sequence[float], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("entry", "seed", "step", "minutes", "task", "success"))
        for run in runs:
            for point in read_points(run.folder):
                for task, rate in point.success.items():
                    writer.writerow((run.entry.name, run.seed, point.step, round(point.minutes, 2), task, rate))
    head = ["entry", "flags", "seed", *(f"{each:g} min" for each in minutes), "last two", "tasks above 0.5"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in runs:
        points = list(read_points(run.folder))
        if points:
            reached = [[point for point in points if point.minutes <= each] for each in minutes]
            at = [
                f"{earlier[-1].mean:.2f}" if earlier and points[-1].minutes > each - 2 else ""
                for earlier, each in zip(reached, minutes, strict=True)
            ]
            last = points[-2:]
            rates = {task: statistics.mean(point.success[task] for point in last) for task in last[-1].success}
            cells = [
                run.entry.name,
                f"`{run.entry.flags}`",
                str(run.seed),
                *at,
                f"{statistics.mean(rates.values()):.2f}",
            ]
            cells.append(", ".join(task.removesuffix("-v3") for task, rate in rates.items() if rate > 0.5))
            lines.append(f"| {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=Path, default=ENTRIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"), help="folder of the run folders")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/recipe"), help="folder of curves.csv and table.md"
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 15, 20], help="columns of the table")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="start no run after so many minutes")
    options, flags = parser.parse_known_args()
    entries = read_entries(options.entries)
    runs = [Run(entry, seed, options.runs / f"{entry.name}-s{seed}") for entry in entries for seed in entry.seeds]
    train_all(runs, options.jobs, flags, time.monotonic() + 60 * options.stop_after)
    write_results(runs, options.minutes, options.out)


if __name__ == "__main__":
    main()
