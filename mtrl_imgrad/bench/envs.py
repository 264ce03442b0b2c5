"""`mtrl-imgrad bench envs`: how fast Meta-World steps, in every way there is to step it, in one table."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mtrl_imgrad.bench import machine
from mtrl_imgrad.bench.env_option import OPTIONS

HORIZON = 500
MOST_STEPS = 10**6
"""Meta-World's episode length."""
BASELINE, LIMIT = "metaworld sync", "physics, 2 threads"
SEED = 1


@dataclass
class Measured:
    """What one option showed.

    Attributes:
        construction: seconds from nothing but a Python interpreter to the first observations.
        warming: seconds to visit every goal once, for options that remember resets.
        memory: proportional set size (PSS) of all its processes after the first round, in MB; without Linux, the
            resident size.
        milliseconds: per vector step, of each round.
        longest: milliseconds of the longest vector step of each round: one with resets.
        others: cores that other programs used just before each round, while all options were idle.
    """

    construction: float
    warming: float
    memory: float = 0.0
    milliseconds: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)


class Option:
    """An option's process; it does nothing until it is asked to."""

    def __init__(self, name: str, tasks: str, horizon: int, steps: int) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        script = Path(__file__).with_name("env_option.py")
        # -P: the folder of the script is not for imports.
        command = [sys.executable, "-P", "-W", "ignore", str(script), name, tasks, *map(str, (SEED, horizon, steps))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=machine.environment(),
        )

    def ask(self, request: str) -> dict[str, float]:
        """Have it do something, and wait for the answer.

        Raises:
            ChildProcessError: it ended instead. The message has the last line that it said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["nothing was said"]
        raise ChildProcessError(f"bench: {self.name} ended with exit code {self._process.wait()}: {said[-1]}")

    def memory(self) -> float:
        """MB of all its processes."""
        total = 0
        process = psutil.Process(self._process.pid)
        for each in (process, *process.children(recursive=True)):
            info = each.memory_full_info()
            total += getattr(info, "pss", info.rss)
        return total / 1e6

    def close(self) -> None:
        """End it and the processes that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self._process.communicate()
        self._errors.close()


@contextlib.contextmanager
def opened(names: tuple[str, ...], tasks: str, horizon: int, steps: int) -> Iterator[list[Option]]:
    """All options, each in its process."""
    with contextlib.ExitStack() as stack:
        options = []
        for name in names:
            options.append(Option(name, tasks, horizon, steps))
            stack.callback(options[-1].close)
        yield options


def bench_envs(tasks: str, steps: int, repeats: int, names: tuple[str, ...] = ()) -> dict[str, Measured]:
    """Measure options in turn: each round runs every option once, so that a change of the machine's speed meets all.

    A run is whole episodes of up to 500 steps with uniformly random actions, and the autoreset at the end of each.

    Args:
        tasks: MT10, MT25 or MT50.
        steps: vector steps per run: at most 500, which is then the episodes' length, or a multiple of 500.
        repeats: rounds.
        names: of the options; none means all.

    Raises:
        ValueError: `steps` or `repeats` is out of range, or there is no such option.
        ChildProcessError: an option failed.
    """
    machine.check_range("steps", steps, 1, MOST_STEPS)
    if steps > HORIZON and steps % HORIZON:
        raise ValueError(f"steps: {steps} is neither between 1 and {HORIZON} nor a multiple of {HORIZON}")
    machine.check_range("repeats", repeats, 1, machine.MOST_ROUNDS)
    if unknown := [name for name in names if name not in OPTIONS]:
        raise ValueError(f"options: there is no {unknown[0]!r}; there are {', '.join(map(repr, OPTIONS))}")
    measured: dict[str, Measured] = {}
    with opened(names or tuple(OPTIONS), tasks, min(steps, HORIZON), steps) as options:
        for option in options:
            measured[option.name] = Measured(option.ask("construct")["seconds"], option.ask("warm")["seconds"])
        for _ in range(repeats):
            for option in options:
                into = measured[option.name]
                into.others.append(machine.busy_cores(0.2))
                answer = option.ask("run")
                into.milliseconds.append(answer["seconds"] * 1e3 / steps)
                into.longest += [answer["longest"] * 1e3] if "longest" in answer else []
                into.memory = into.memory or option.memory()
    return measured


def ratio(measured: dict[str, Measured], name: str, to: str) -> tuple[float, float] | None:
    """How many times as fast as another option: the median over rounds, and that of the fastest runs. None where the
    other was not measured or this one steps no tasks."""
    if to not in measured or name.startswith("empty"):
        return None
    theirs, ours = measured[to].milliseconds, measured[name].milliseconds
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), min(theirs) / min(ours)


COLUMNS = (
    # two lines of title, width
    ("x metaworld", "sync, median", 13),
    ("", "min", 7),
    ("x limit,", "median", 9),
    ("", "min", 7),
    ("ms per vector", "step, median", 14),
    ("", "min", 8),
    ("longest", "step", 9),
    ("env steps", "per second", 12),
    ("memory", "MB", 8),
    ("construction", "s", 14),
)


def table(measured: dict[str, Measured], rows: int) -> str:
    """The figures as text, ratios first. `rows` are the environments in a vector step."""
    width = max(map(len, measured))
    lines = [" " * width + "".join(f"{column[line]:>{column[2]}}" for column in COLUMNS) for line in (0, 1)]
    for name, one in measured.items():
        ratios = [ratio(measured, name, to) or (None, None) for to in (BASELINE, LIMIT)]
        median, longest = statistics.median(one.milliseconds), statistics.median(one.longest) if one.longest else None
        shown = [_shown(value, 2) for pair in ratios for value in pair]
        shown += [_shown(median, 3), _shown(min(one.milliseconds), 3), _shown(longest, 1)]
        rate = None if name.startswith("empty") else rows * 1e3 / median
        shown += [_shown(rate, 0), _shown(one.memory, 0), _shown(one.construction, 1)]
        lines.append(
            f"{name:<{width}}" + "".join(f"{text:>{column[2]}}" for text, column in zip(shown, COLUMNS, strict=True))
        )
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def disturbance(measured: dict[str, Measured]) -> str:
    """How busy the machine was with other things, in a line: on a busy one the figures mean little."""
    used = [cores for one in measured.values() for cores in one.others]
    return (
        f"other programs used {statistics.median(used):.1f} of {psutil.cpu_count()} cores between the runs "
        f"(median; at most {max(used):.1f})"
    )


def as_json(measured: dict[str, Measured], settings: dict[str, Any]) -> str:
    """Every round of every option, the settings, and what they were measured on."""
    packages = ("metaworld", "mujoco", "gymnasium", "numpy", "stable-baselines3")
    return machine.as_json({"options": {name: asdict(one) for name, one in measured.items()}}, settings, packages)
