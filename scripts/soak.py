"""Train for an hour with evaluation, checkpoints and logs on, and see whether anything grows or slows down.

    python scripts/soak.py --minutes 60 --out docs/results/soak

Samples of the whole process tree (memory, open files, threads, processes) go to samples.csv every ten seconds, what
they say to soak.md. The exit code is 1 where memory, open files or threads grew, or where training could not be stopped
and resumed; speed is told, and judged by the reader, who knows what else the machine was doing.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from scipy import stats

FLAGS = (
    "--config quickstart --device cpu --threads 1 --replay.capacity 10000 --sac.steps 1000000000 "
    "--eval.every 10000 --eval.goals-per-task 2 --checkpoint.every 5000 --checkpoint.keep-every 20000 --log.every 500"
)
"""The quick start with a replay that is soon full, and everything beside training ten times as often as usual."""
WINDOWS = 6
"""Parts of the time after warm-up; their medians are what is compared."""
LIMITED = ("memory", "files", "threads", "processes", "shared")
"""What must not grow."""
INTERVAL = 10.0
"""Seconds between samples."""
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Sample:
    """What the process tree held at one moment.

    Attributes:
        seconds: since the start.
        memory: proportional set size of all processes, in MB: shared pages are counted once.
        files: open file descriptors.
        threads: of all processes.
        processes: how many.
        shared: files in /dev/shm.
        step: simulator steps per task by progress.csv, 0 before its first row.
        fps: simulator steps per second over all tasks by its last row, evaluations excluded.
        cpu: processor time of all processes so far, in seconds.
    """

    seconds: float
    memory: float
    files: int
    threads: int
    processes: int
    shared: int
    step: int
    fps: float
    cpu: float


@dataclass(frozen=True)
class Trend:
    """A straight line through the medians of the windows after warm-up.

    Attributes:
        name: the quantity.
        medians: of the windows.
        slope: change per hour.
        low: lower end of its 95 % t-interval.
        high: upper end.
    """

    name: str
    medians: tuple[float, ...]
    slope: float
    low: float
    high: float

    def grows(self, allowed: float) -> bool:
        """Whether the slope is positive beyond noise, and by more per hour than this part of the first median."""
        return self.low > 0 and self.slope > allowed * self.medians[0]


def trend(name: str, hours: Sequence[float], medians: Sequence[float]) -> Trend:
    """The line through medians of windows. Neighbouring samples move together, medians of minutes hardly do: that is
    why the interval is theirs."""
    x, y = np.array(hours), np.array(medians)
    slope, level = np.polyfit(x, y, 1)
    errors = y - slope * x - level
    deviation = np.sqrt((errors**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.975, len(x) - 2) * deviation)
    return Trend(name, tuple(y.tolist()), float(slope), float(slope) - half, float(slope) + half)


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """Of everything but the clocks, and of what a step costs: in processor time, and by the wall clock with evaluations
    and checkpoints."""
    parts = [samples[part[0] : part[-1] + 1] for part in np.array_split(np.arange(len(samples)), WINDOWS)]
    hours = [median(sample.seconds for sample in part) / 3600 for part in parts]
    names = ("memory", "files", "threads", "processes", "shared", "fps")
    found = [trend(name, hours, [median(getattr(sample, name) for sample in part) for part in parts]) for name in names]
    steps = [max(1, part[-1].step - part[0].step) for part in parts]
    for name, clock in (("cpu_ms_per_step", "cpu"), ("ms_per_step", "seconds")):
        spent = [1000 * (getattr(part[-1], clock) - getattr(part[0], clock)) for part in parts]
        found.append(trend(name, hours, [ms / step for ms, step in zip(spent, steps, strict=True)]))
    return found


def take_sample(process: psutil.Process, run: Path, started: float) -> Sample:
    memory, cpu, files, threads, processes = 0.0, 0.0, 0, 0, 0
    for each in [process, *process.children(recursive=True)]:
        try:
            with each.oneshot():
                memory += each.memory_full_info().pss / 2**20
                files += each.num_fds()
                threads += each.num_threads()
                processes += 1
                cpu += sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:  # a compiler that has just ended
            continue
    row = _last_row(run / "progress.csv")
    step, fps = int(row.get("step") or 0), float(row.get("time/fps") or 0)
    shared = len(list(SHARED.iterdir())) if SHARED.is_dir() else 0
    return Sample(time.monotonic() - started, memory, files, threads, processes, shared, step, fps, cpu)


def _last_row(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = list(csv.DictReader(lines[:1] + lines[-1:])) if len(lines) > 1 else []
    return rows[-1] if rows else {}


def train(run: Path, flags: Sequence[str], minutes: float) -> list[Sample]:
    """Start a training, sample it, stop it as a user would, and have it resumed for a moment.

    Raises:
        RuntimeError: it ended by itself, or did not save and end when asked to.
    """
    command = [sys.executable, "-m", "mtrl_imgrad", "train"]
    started = time.monotonic()
    samples: list[Sample] = []
    with subprocess.Popen([*command, *flags, "--run-dir", str(run)], stdout=subprocess.DEVNULL) as training:
        process = psutil.Process(training.pid)
        while time.monotonic() - started < 60 * minutes:
            time.sleep(min(INTERVAL, 0.6 * minutes))
            if training.poll() is not None:
                raise RuntimeError(f"training ended by itself with exit code {training.returncode}")
            samples.append(take_sample(process, run, started))
        training.send_signal(signal.SIGTERM)
        if training.wait(120) != 128 + signal.SIGTERM:
            raise RuntimeError(f"SIGTERM ended training with exit code {training.returncode}")
    reached = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    more = [*command, "--resume", str(run), "--sac.steps", str(reached + 2000), "--eval.final", "False"]
    resumed = subprocess.run(more, stdout=subprocess.DEVNULL, check=False)
    if resumed.returncode:
        raise RuntimeError(f"--resume ended with exit code {resumed.returncode}")
    return samples


def judge(samples: Sequence[Sample], warm_up: float) -> tuple[str, bool]:
    """Tables in Markdown, and whether nothing grew.

    Args:
        samples: in the order of time.
        warm_up: minutes at the start that are left out.
    """
    found = trends([sample for sample in samples if sample.seconds >= 60 * warm_up])
    grown = [each.name for each in found if each.name in LIMITED and each.grows(0.005)]
    lines = [
        f"{samples[-1].seconds / 60:.0f} minutes, {samples[-1].step:,} steps per task. The first {warm_up:g} minutes "
        f"are left out, the rest is cut into {WINDOWS} windows, of which medians are shown.",
        "",
        "| | " + " | ".join(f"window {number}" for number in range(1, WINDOWS + 1)) + " | change per hour [95 %] |",
        "|---" * (WINDOWS + 2) + "|",
    ]
    for each in found:
        medians = " | ".join(f"{value:,.2f}" for value in each.medians)
        lines.append(f"| {each.name} | {medians} | {each.slope:+.2f} [{each.low:+.2f}, {each.high:+.2f}] |")
    lines += [
        "",
        "Last window over first: "
        + ", ".join(f"{each.name} {_ratio(each):.3f}" for each in found if each.medians[0])
        + ".",
        f"Grown: {', '.join(grown) or 'nothing'}.",
    ]
    return "\n".join(lines) + "\n", not grown


def _ratio(of: Trend) -> float:
    return of.medians[-1] / of.medians[0]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=60.0)
    made.add_argument("--warm-up", type=float, default=10.0, help="minutes at the start that are left out")
    made.add_argument("--flags", default=FLAGS, help="of `mtrl-imgrad train`")
    made.add_argument("--out", type=Path, required=True, help="folder for samples.csv and soak.md")
    return made


def main() -> int:
    options = parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp())
    try:
        samples = train(place / "run", options.flags.split(), options.minutes)
    finally:
        shutil.rmtree(place)
    with (options.out / "samples.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Sample)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: round(value, 1) for name, value in asdict(sample).items()} for sample in samples)
    text, flat = judge(samples, options.warm_up)
    (options.out / "soak.md").write_text(f"# An hour of training\n\n`python scripts/soak.py`: {text}")
    print(text)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
