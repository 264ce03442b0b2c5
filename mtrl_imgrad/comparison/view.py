"""The progress of a comparison on the console: a table that is drawn again, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtrl_imgrad.comparison.plan import PlannedRun, State, last_row
from mtrl_imgrad.comparison.sweep import Progress

SUMMARY_EVERY = 60.0
"""Seconds between two summaries where there is no terminal."""
SHOWN = 40
"""Rows of the table; of a longer comparison the finished and the waiting runs are only counted."""


@dataclass(frozen=True)
class Standing:
    """What a run's `progress.csv` says."""

    step: int
    success: str
    elapsed: float


def standing(run: PlannedRun) -> Standing:
    """How far a run is, from the last row that it wrote."""
    row = last_row(run.folder / "progress.csv")
    rate = row.get("eval/success_rate") or row.get("rollout/success_rate") or ""
    try:
        return Standing(
            int(row.get("step") or 0), f"{float(rate):.2f}" if rate else "", float(row.get("time/elapsed") or 0.0)
        )
    except ValueError:  # the run itself says that its file is damaged
        return Standing(0, "", 0.0)


@contextmanager
def progress_view(runs: Sequence[PlannedRun]) -> Iterator[Callable[[Progress], None]]:
    """What `run_all` tells its progress to."""
    console = Console(highlight=False, soft_wrap=True)
    now = {run.name: standing(run) for run in runs}
    started, begun = time.monotonic(), {name: one.step for name, one in now.items()}
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:

            def draw(progress: Progress) -> None:
                now.update({run.name: standing(run) for run in progress.of("running")})
                live.update(_table(progress, now, time_left(progress, now, begun, started)))

            yield draw
        return

    told: dict[str, State] = {}
    summarised = started

    def tell(progress: Progress) -> None:
        nonlocal summarised
        for run in runs:
            state = progress.states[run.name]
            if told.get(run.name, "to do") != state:
                reason = f": {progress.reasons[run.name]}" if run.name in progress.reasons else ""
                console.print(f"{run.name}: {state}{reason}", markup=False)
                told[run.name] = state
        if time.monotonic() - summarised > SUMMARY_EVERY:
            summarised = time.monotonic()
            now.update({run.name: standing(run) for run in progress.of("running")})
            console.print(summary(progress, now, time_left(progress, now, begun, started)), markup=False)

    yield tell


def summary(progress: Progress, now: Mapping[str, Standing], left: float | None) -> str:
    """One line."""
    running = [(run, now[run.name]) for run in progress.of("running")]
    parts = [f"{len(progress.of('finished'))} of {len(progress.runs)} finished"]
    parts += [f"{run.name} {mine.step:,}/{run.last_step:,} {mine.success}".rstrip() for run, mine in running]
    return "; ".join([*parts, *([f"about {left / 60:.0f} min left"] if left is not None else [])])


def time_left(
    progress: Progress, now: Mapping[str, Standing], begun: Mapping[str, int], started: float
) -> float | None:
    """Seconds, from the steps that all runs together took since the start; None while there are none."""
    finished = progress.of("finished")
    steps = {run.name: run.last_step if run in finished else now[run.name].step for run in progress.runs}
    taken = sum(max(0, steps[run.name] - begun[run.name]) for run in progress.runs)
    missing = sum(run.last_step - steps[run.name] for run in progress.of("to do", "interrupted", "running"))
    return (time.monotonic() - started) / taken * missing if taken else None


def _table(progress: Progress, now: Mapping[str, Standing], left: float | None) -> Table:
    finished, total = len(progress.of("finished")), len(progress.runs)
    title = f"{finished} of {total} runs finished"
    table = Table(title=title if left is None else f"{title}, about {left / 60:.0f} min left", title_justify="left")
    for column in ("run", "state", "", "steps", "success", "minutes"):
        table.add_column(column)
    runs = progress.runs if total <= SHOWN else progress.of("running", "interrupted", "failed")
    for run in runs:
        mine, state = now[run.name], progress.states[run.name]
        step = run.last_step if state == "finished" else mine.step
        bar = ProgressBar(total=run.last_step, completed=step, width=20)
        minutes = f"{mine.elapsed / 60:.1f}" if mine.elapsed else ""
        table.add_row(run.name, state, bar, f"{step:,}/{run.last_step:,}", mine.success, minutes)
    failures = [f"{name} failed: {reason}" for name, reason in progress.reasons.items()]
    table.caption = Text("\n".join(failures)) if failures else None
    return table
