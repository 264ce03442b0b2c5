"""Runs the quick start for several seeds, one after another, and writes the README's table and raw CSV.

python scripts/quickstart_seeds.py --seeds 1 2 3 --out docs/results/quickstart
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
from pathlib import Path


def final_success(run: Path) -> dict[str, float]:
    """Success rate of each task in the run's evaluation on all goals."""
    with (run / "eval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        task: statistics.mean(int(row["success"]) for row in rows if row["task"] == task)
        for task in {row["task"]: None for row in rows}
    }


def minutes_to_last_update(run: Path) -> float:
    """Wall-clock minutes from the process's start to the last log row, which follows the last update."""
    with (run / "progress.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["time/elapsed"]) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/quickstart"), help="folder of the table and the CSV files"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the runs; finished ones are not run again"
    )
    arguments, flags = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in arguments.seeds:
        run = arguments.runs / f"quickstart-s{seed}"
        if not (run / "eval.csv").exists():
            command = ["train", "--config", "quickstart", "--seed", str(seed), "--run-dir", str(run), *flags]
            subprocess.run([sys.executable, "-m", "mtrl_imgrad", *command], check=True)
        for name in ("eval.csv", "progress.csv"):
            shutil.copy(run / name, arguments.out / f"s{seed}_{name}")
        success = final_success(run)
        values = [statistics.mean(success.values()), *success.values()]
        lines.append(
            f"| {seed} | {minutes_to_last_update(run):.1f} | " + " | ".join(f"{value:.2f}" for value in values) + " |"
        )
    header = "| seed | minutes to last update | mean | " + " | ".join(success) + " |"
    table = "\n".join([header, "|---" * (3 + len(success)) + "|", *lines])
    (arguments.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
