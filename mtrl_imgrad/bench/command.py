"""The command line of `mtrl-imgrad bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from mtrl_imgrad.bench import machine
from mtrl_imgrad.files import check_file, check_place
from mtrl_imgrad.parsing import UserError, parse, told_as_user_errors


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Measure how fast Meta-World's environments step in every way there is to step them. The options take turns, each
    in its own process; ours has visited every goal before, since it remembers resets. MT50 with all options needs about
    20 GB of memory. For the aggregators' solvers and for whole updates, see `mtrl-imgrad bench solvers --help` and
    `mtrl-imgrad bench update --help`."""

    what: Annotated[Literal["envs", "solvers", "update"], tyro.conf.Positional]
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
    """Measure what one call of each aggregator that needs the Gramian alone costs on one CPU thread, solvers on both
    routes, beside clarabel called directly, scipy's SLSQP and TorchJD's class, where these are installed. The options
    take turns."""

    what: Annotated[Literal["solvers"], tyro.conf.Positional]
    """What to measure."""
    tasks: tuple[int, ...] = (10, 50)
    """Numbers of tasks K."""
    repeats: int = 15
    """Rounds; each calls every option once on a random Gramian of each family."""
    json: Path | None = None
    """Also write every round's figures to this file."""


@dataclasses.dataclass(frozen=True)
class UpdateBenchOptions:
    """Measure what one whole SAC update costs with each aggregator, from sampling to the target critics, on random data
    of Meta-World's shapes and 3 x 400 networks, beside the plain mean by one ordinary backward pass, K backward passes
    with SLSQP, TorchJD's CAGrad where it is installed, and stable-baselines3's SAC. The variants take turns."""

    what: Annotated[Literal["update"], tyro.conf.Positional]
    """What to measure."""
    benchmark: Literal["mt10", "mt25", "mt50"] = "mt10"
    """Task set, which says how many tasks there are."""
    aggregator: tuple[str, ...] = ("imgrad", "cagrad", "conicgrad")
    """Rules to measure besides the mean, as `train` takes them; the first one's update is measured part by part too."""
    mode: tuple[Literal["eager", "compiled", "eager-bfloat16", "compiled-bfloat16"], ...] = ("compiled", "eager")
    """How ours and the plain mean run; eager-bfloat16 has the matrix products in bfloat16."""
    repeats: int = 20
    """Rounds; each makes one update of every variant. Two more come before and do not count."""
    batch_per_task: int = 128
    """Transitions of each task in one update."""
    threads: int = 0
    """CPU threads of torch; 0 takes torch's own choice."""
    options: tuple[str, ...] = ()
    """Names of the variants to measure, as the table shows them before the comma; none means all."""
    memory: bool = True
    """Measure peak memory too, for every variant in a process of its own."""
    json: Path | None = None
    """Also write every round's figures to this file."""


Options: TypeAlias = BenchOptions | SolverBenchOptions | UpdateBenchOptions


def bench_options(arguments: Sequence[str]) -> Options:
    """What `bench` is asked for: environments, solvers and updates have different flags."""
    kinds = {"solvers": SolverBenchOptions, "update": UpdateBenchOptions}
    kind = next((kinds[word] for word in arguments if word in kinds), BenchOptions)
    options = parse(kind, arguments, "bench")
    if options.json:
        with told_as_user_errors():
            check_place("json", options.json.parent)
            if not options.json.parent.is_dir():
                raise UserError(f"json: there is no folder {options.json.parent} to write {options.json.name} into.")
            check_file("json", options.json)
    return options


def command_bench(arguments: Sequence[str]) -> None:
    options = bench_options(arguments)
    if isinstance(options, SolverBenchOptions):
        text = _bench_solvers(options)
    elif isinstance(options, UpdateBenchOptions):
        text = _bench_update(options)
    else:
        text = _bench_envs(options)
    if options.json:
        options.json.write_text(text)


def _settings(options: Options) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "json"}


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


def _bench_update(options: UpdateBenchOptions) -> str:
    from mtrl_imgrad.bench import update

    size = update.Size(int(options.benchmark.removeprefix("mt")), options.batch_per_task)
    with told_as_user_errors():
        figures = update.bench_update(
            size,
            options.aggregator,
            options.mode,
            options.repeats,
            threads=options.threads,
            names=options.options,
            memory=options.memory,
        )
    print(
        f"{options.benchmark.upper()}, {size.rows} transitions of each task, networks {size.depth} x {size.width}, "
        f"{figures.threads} threads, {options.repeats} rounds"
    )
    print(update.table(figures))
    print(update.breakdown(figures))
    print(machine.others_before(figures.others))
    return update.as_json(figures, _settings(options))
