"""`mtrl-imgrad bench update`: what an update costs with each aggregator, beside the plain mean and other codes.

Peak memory is measured in a process of its own for each variant: `python -m mtrl_imgrad.bench.update REQUEST` prints it
as JSON.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from mtrl_imgrad.aggregators import resolve
from mtrl_imgrad.bench import machine
from mtrl_imgrad.bench.update_references import Size
from mtrl_imgrad.bench.update_variants import PARTS, PLAIN, REST, SB3, SLSQP, TORCHJD, Update, Way, dissected, makers

WARM_UP = 2
"""Rounds before those that count."""
MEMORY_UPDATES = 3
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux tells a process its peak memory and forgets it; elsewhere they do not exist."""


@dataclass
class Measured:
    """What one variant showed.

    Attributes:
        milliseconds: of one update, in each round.
        memory: peak resident memory during its first updates above that before them, in MB, in a process of its own;
            None where it was not measured.
    """

    milliseconds: list[float] = field(default_factory=list)
    memory: float | None = None


@dataclass
class Figures:
    """A run of the benchmark.

    Attributes:
        variants: in the table's order.
        parts: milliseconds of each part of an update, in each round; empty where that variant was not measured.
        dissected: the variant that the parts belong to.
        missing: what is not installed, in a line, or empty.
        others: cores that other programs used before the run.
        threads: of torch.
    """

    variants: dict[Way, Measured]
    parts: dict[str, list[float]]
    dissected: Way
    missing: str
    others: float
    threads: int


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _threads(number: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def bench_update(
    size: Size,
    aggregators: Sequence[str],
    modes: Sequence[str],
    repeats: int,
    *,
    threads: int = 0,
    names: Sequence[str] = (),
    memory: bool = False,
) -> Figures:
    """Measure variants in turn: each round makes one update of each, so that a change of the machine's speed meets all.

    Args:
        size: shapes.
        aggregators: names of ours; the mean is added.
        modes: of ours and of the plain mean.
        repeats: rounds that count, after two that do not.
        threads: of torch; 0 leaves its choice.
        names: of the variants to measure; none means all.
        memory: whether to measure peak memory too.

    Raises:
        ValueError: something is out of range, or there is no such aggregator, mode or variant.
        ChildProcessError: a process that measures memory failed.
    """
    machine.check_range("repeats", repeats, 1, machine.MOST_ROUNDS)
    machine.check_range("batch_per_task", size.rows, 1, 2**20)
    machine.check_range("threads", threads, 0, 1024)
    for name, given in (("aggregator", aggregators), ("mode", modes)):
        if not given:
            raise ValueError(f"{name}: at least one is needed")
    ways, missing = makers(size, aggregators, modes)
    known = list(dict.fromkeys(name for name, _ in ways))
    if unknown := [name for name in names if name not in known]:
        there_are = f"there is no {unknown[0]!r}; there are {', '.join(map(repr, known))}"
        raise ValueError(f"options: {missing if missing and unknown[0] == TORCHJD else there_are}")
    chosen = {way: make for way, make in ways.items() if not names or way[0] in names}
    others = machine.busy_cores(0.5)
    figures = Figures({way: Measured() for way in chosen}, {}, (f"ours {aggregators[0]}", "eager"), missing, others, 0)
    if memory:
        for way in chosen:
            request = {"size": dataclasses.asdict(size), "aggregators": aggregators, "way": way, "threads": threads}
            figures.variants[way].memory = machine.answer_of(__name__, [json.dumps(request)], {})
    with _threads(threads) as figures.threads:
        updates = {way: make() for way, make in chosen.items()}
        apart = Update(size, resolve(aggregators[0])(), {}) if figures.dissected in chosen else None
        figures.parts = {part: [] for part in PARTS} if apart else {}
        for turn in range(-WARM_UP, repeats):
            for way, update in updates.items():
                started = time.perf_counter()
                update()
                if turn >= 0:
                    figures.variants[way].milliseconds.append((time.perf_counter() - started) * 1e3)
            for part, spent in (dissected(apart) if apart else {}).items():
                figures.parts[part] += [spent] if turn >= 0 else []
    return figures


def peak_memory(size: Size, aggregators: Sequence[str], way: Way) -> float:
    """MB that the first updates of a variant take at most above what this process held before them."""
    update = makers(size, aggregators, [way[1]])[0][way]()
    held = psutil.Process().memory_info().rss
    if RESET_PEAK.exists():
        RESET_PEAK.write_text("5")  # proc(5): sets the peak to the present size
    for _ in range(MEMORY_UPDATES):
        update()
    return (_peak() - held) / 1e6


def _peak() -> int:
    """Bytes of resident memory at most."""
    if STATUS.exists():
        return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    resource = importlib.import_module("resource")  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


# ---------------------------------------------------------------------------------------------------------------------
# Telling
# ---------------------------------------------------------------------------------------------------------------------


def ratios(figures: Figures, way: Way, to: Way) -> tuple[float, float] | None:
    """A variant's time over another's: the median over rounds, and the ratio of the medians. None where one of them was
    not measured."""
    if way not in figures.variants or to not in figures.variants:
        return None
    ours, theirs = figures.variants[way].milliseconds, figures.variants[to].milliseconds
    by_round = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return by_round, statistics.median(ours) / statistics.median(theirs)


COLUMNS = (
    # two lines of title, width
    ("x plain mean", "by round", 14),
    ("", "medians", 9),
    ("ms per update", "median", 15),
    ("", "min", 10),
    ("MB above", "plain mean", 12),
    ("times as fast as", "K backward", 18),
    ("", "TorchJD", 9),
    ("", "SB3", 7),
)


def table(figures: Figures) -> str:
    """Ratios to the plain mean of the same mode first: the median over rounds of a round's ratio, and the ratio of the
    medians. Then times, memory, and how many times as fast as the other codes, each the median over rounds."""
    names = [f"{name}, {mode}" for name, mode in figures.variants]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{column[line]:>{column[2]}}" for column in COLUMNS) for line in (0, 1)]
    for shown, ((name, mode), one) in zip(names, figures.variants.items(), strict=True):
        plain = (PLAIN, mode)
        by_round, of_medians = ratios(figures, (name, mode), plain) or (None, None)
        base = figures.variants[plain].memory if plain in figures.variants else None
        above = None if one.memory is None or base is None else one.memory - base
        cells = [_shown(by_round, 2), _shown(of_medians, 2)]
        cells += [_shown(statistics.median(one.milliseconds), 2), _shown(min(one.milliseconds), 2), _shown(above, 0)]
        for reference in (SLSQP, TORCHJD, SB3):
            times = ratios(figures, (reference, "eager"), (name, mode))
            cells.append(_shown(times and times[0], 2))
        lines.append(f"{shown:<{width}}" + "".join(f"{x:>{c[2]}}" for x, c in zip(cells, COLUMNS, strict=True)))
    return "\n".join([*lines, *filter(None, [figures.missing])])


def breakdown(figures: Figures) -> str:
    """Where the time of one eager update goes: medians over rounds of its parts, each run alone on the same shapes, and
    what they leave of the whole."""
    if not figures.parts:
        return "no breakdown: the first aggregator's eager update was not measured"
    whole = statistics.median(figures.variants[figures.dissected].milliseconds)
    spent = {part: statistics.median(each) for part, each in figures.parts.items()}
    spent["not covered"] = whole - sum(spent.values())
    lines = [f"parts of {', '.join(figures.dissected)}: {whole:.2f} ms, from sampling to targets"]
    for part, milliseconds in spent.items():
        note = f"  {REST}" if part == "not covered" else ""
        lines.append(f"  {part:<26}{milliseconds:>9.2f} ms{milliseconds / whole:>7.1%}{note}")
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def as_json(figures: Figures, settings: dict[str, Any]) -> str:
    """Every round of every variant and part, the settings, and what they were measured on."""
    variants = [
        {"name": name, "mode": mode} | dataclasses.asdict(one) for (name, mode), one in figures.variants.items()
    ]
    measured = {
        "variants": variants,
        "parts": {"of": list(figures.dissected), "milliseconds": figures.parts},
        "missing": figures.missing,
        "others": figures.others,
        "threads": figures.threads,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return machine.as_json(measured, settings, ("torch", "numpy", "scipy", "stable-baselines3", "torchjd"))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with _threads(asked["threads"]):
        print(json.dumps(peak_memory(Size(**asked["size"]), asked["aggregators"], tuple(asked["way"]))))
