"""Trains the entries of scripts/recipe_search.yaml, and collects what each of them reached.

    python scripts/recipe_search.py --jobs 2 --runs runs/recipe --out docs/results/recipe

An entry is a name, the flags in which it differs from scripts/recipe_start.yaml, why it was tried, and its seeds, which
are others than those of the results. A run that was stopped goes on, a finished one is not run again. `curves.csv` has
the success of every run, finished or not; `table.md` the mean after some numbers of updates.

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

import yaml

ENTRIES = Path(__file__).with_suffix(".yaml")
START = Path(__file__).with_name("recipe_start.yaml")
TAGS = {"training": "rollout/success_rate/", "evaluation": "eval/success_rate/"}
"""Success of the episodes since the row before (horizon 200, actions sampled), and of the deterministic policy on a few
goals (horizon 500)."""


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

    @property
    def mean(self) -> float:
        return statistics.mean(self.success.values())


def read_entries(path: Path) -> list[Entry]:
    return [
        Entry(name, plain.get("flags", ""), plain["why"], tuple(plain["seeds"]))
        for name, plain in yaml.safe_load(path.read_text()).items()
    ]


def read_points(run: Path, kind: str) -> Iterator[Point]:
    """The success of a run so far, in training or in evaluations."""
    path = run / "progress.csv"
    if not path.exists():
        return
    before, newest = 0.0, 0.0  # seconds of the processes before this one, and of this one
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            elapsed = float(row["time/elapsed"])
            before += newest if elapsed < newest else 0.0
            newest = elapsed
            rates = {tag.removeprefix(TAGS[kind]): rate for tag, rate in row.items() if tag.startswith(TAGS[kind])}
            success = {task: float(rate) for task, rate in rates.items() if rate}
            if success:
                minutes = (before + newest) / 60
                yield Point(int(row["step"]), int(float(row["train/updates"] or 0)), minutes, success)


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


def write_results(runs: Sequence[Run], updates: Sequence[int], out: Path) -> None:
    """`curves.csv`, and `table.md` with the mean success in training up to each number of updates, and that of the last
    evaluation."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("entry", "seed", "of", "step", "updates", "minutes", "task", "success"))
        for run in runs:
            for kind in TAGS:
                for point in read_points(run.folder, kind):
                    at = (point.step, point.updates, round(point.minutes, 2))
                    writer.writerows(
                        (run.entry.name, run.seed, kind, *at, task, round(rate, 4))
                        for task, rate in point.success.items()
                    )
    head = ["entry", "flags", "seed", *(f"{each:,}" for each in updates), "last evaluation", "tasks below 0.8 in it"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in runs:
        training, evaluation = (list(read_points(run.folder, kind)) for kind in TAGS)
        if training:
            reached = [[point for point in training if point.updates <= each] for each in updates]
            going = [training[-1].updates >= 0.95 * each for each in updates]
            at = [f"{past[-1].mean:.2f}" if past and there else "" for past, there in zip(reached, going, strict=True)]
            mean, weak = "", ""
            if evaluation:
                rates = evaluation[-1].success
                mean = f"{evaluation[-1].mean:.2f} at {evaluation[-1].updates:,}"
                weak = ", ".join(f"{task.removesuffix('-v3')} {rate:.1f}" for task, rate in rates.items() if rate < 0.8)
            cells = [run.entry.name, f"`{run.entry.flags}`" * bool(run.entry.flags), str(run.seed), *at, mean, weak]
            lines.append(f"| {' | '.join(cells)} |")
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
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="minutes after which no run is started")
    options, flags = parser.parse_known_args()
    entries = read_entries(options.entries)
    runs = [Run(entry, seed, options.runs / f"{entry.name}-s{seed}") for entry in entries for seed in entry.seeds]
    if options.jobs:
        train_all(runs, options.jobs, flags, time.monotonic() + 60 * options.stop_after)
    write_results(runs, options.updates, options.out)


if __name__ == "__main__":
    main()
