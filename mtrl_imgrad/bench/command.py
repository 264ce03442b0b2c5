"""The command line of `mtrl-imgrad bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mtrl_imgrad.parsing import UserError, parse, told_as_user_errors


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Measure how fast Meta-World's environments step in every way there is to step them. The options take turns, each
    in its own process; ours has visited every goal before, since it remembers resets. MT50 with all options needs about
    20 GB of memory. For the aggregators' solvers, see `mtrl-imgrad bench solvers --help`."""

    what: Annotated[Literal["envs", "solvers"], tyro.conf.Positional]
    """What to measure."""
    benchmark: Literal["mt10", "mt25", "mt50"] = "mt10"
    """Task set."""
    steps: int = 500
    """Vector steps per run: at most 500, which is then the episodes' length, or a multiple of 500."""
    repeats: int = 5
    """Rounds; each runs every option once."""
    options: tuple[str, ...] = ()
    """Names of the options to measure, as the table shows them; none means all."""
    json: Path | None = None
    """Also write every round's figures to this file."""


@dataclasses.dataclass(frozen=True)
class SolverBenchOptions:
    """Measure what one call of each aggregator with a solver costs on one CPU thread, on both routes, beside clarabel
    called directly, scipy's SLSQP and TorchJD's class, where these are installed. The options take turns."""

    what: Annotated[Literal["solvers"], tyro.conf.Positional]
    """What to measure."""
    tasks: tuple[int, ...] = (10, 50)
    """Numbers of tasks K."""
    repeats: int = 15
    """Rounds; each calls every option once on a random Gramian of each family."""
    json: Path | None = None
    """Also write every round's figures to this file."""


def bench_options(arguments: Sequence[str]) -> BenchOptions | SolverBenchOptions:
    """What `bench` is asked for: environments and solvers have different flags."""
    options = parse(SolverBenchOptions if "solvers" in arguments else BenchOptions, arguments, "bench")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"json: there is no folder {options.json.parent} to write {options.json.name} into.")
    return options


def command_bench(arguments: Sequence[str]) -> None:
    options = bench_options(arguments)
    text = _bench_solvers(options) if isinstance(options, SolverBenchOptions) else _bench_envs(options)
    if options.json:
        options.json.write_text(text)


def _settings(options: BenchOptions | SolverBenchOptions) -> dict[str, Any]:
    return dataclasses.asdict(options) | {"json": str(options.json)}


def _bench_solvers(options: SolverBenchOptions) -> str:
    from mtrl_imgrad.bench import solvers

    with told_as_user_errors():
        measured = solvers.bench_solvers(options.tasks, options.repeats)
    print(solvers.table(measured))
    return solvers.as_json(measured, _settings(options))


def _bench_envs(options: BenchOptions) -> str:
    from mtrl_imgrad.bench import envs

    tasks = options.benchmark.upper()
    with told_as_user_errors():
        measured = envs.bench_envs(tasks, options.steps, options.repeats, options.options)
    print(f"{tasks}, runs of {options.steps} vector steps with their resets, {options.repeats} rounds")
    print(envs.table(measured, int(tasks.removeprefix("MT"))))
    print(envs.disturbance(measured))
    return envs.as_json(measured, _settings(options))
