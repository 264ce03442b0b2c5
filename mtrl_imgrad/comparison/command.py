"""The command `compare`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from mtrl_imgrad.comparison.estimate import measure
from mtrl_imgrad.comparison.plan import PlannedRun, plan
from mtrl_imgrad.comparison.processes import flags_of_share, share_of_machine, start_here
from mtrl_imgrad.comparison.ray_launcher import on_ray
from mtrl_imgrad.comparison.sweep import StartedRun, run_all
from mtrl_imgrad.comparison.view import progress_view
from mtrl_imgrad.config import Config, method_name
from mtrl_imgrad.files import FolderLock, check_place, make_folder
from mtrl_imgrad.overlays import field_names
from mtrl_imgrad.parsing import PROGRAM, UserError, parse, told_as_user_errors
from mtrl_imgrad.report.command import console_text, write_report
from mtrl_imgrad.run_description import command_line, run_name

HELP = """Train the same experiment with several aggregators and seeds, and compare them.

Options that are not below are those of `mtrl-imgrad train` (--config, --benchmark, --sac.steps, ...), the same for all
runs. The runs are processes of their own. What is finished is not trained again and what was interrupted goes on, so
that the same command continues a comparison; more seeds or aggregators may be added to it.

Example: mtrl-imgrad compare --config quickstart --aggregators mean imgrad cagrad,c=0.5 --seeds 5 --jobs 2"""
OWN = ("seed", "run-dir", "run_dir", "aggregator", "algorithm", "resume")
"""Flags of `train` that each run gets from the comparison."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """A comparison."""

    aggregators: tuple[str, ...] = ("mean", "pcgrad", "cagrad", "imgrad", "conicgrad")
    """Rules that `mtrl-imgrad list aggregators` shows, or module:Class, or the baselines sb3-sac, sb3-sac-blind and
    sb3-sac-single, each with fields where wanted: NAME,FIELD=VALUE,..."""
    seeds: int = 5
    """Runs per aggregator; one seed each."""
    first_seed: int = 1
    """The lowest seed; the others follow."""
    jobs: int = 1
    """Runs at once on this machine. Its cores are divided among them where --threads and --envs.workers do not say
    otherwise."""
    out: str = ""
    """Folder of the run folders and of their report; empty makes runs/compare-<benchmark>."""
    dry_run: bool = False
    """Only show the runs, and how long they will take."""
    launcher: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: a Ray cluster, whose machines have this version of mtrl_imgrad."""
    address: str = ""
    """Of the Ray cluster; empty starts one on this machine."""
    cpus: int = 1
    """CPU cores of one run on a Ray cluster. A rule of your own must be installed on its machines."""
    gpus: float = 0.0
    """GPUs of one run on a Ray cluster; 0.25 puts four runs on one."""

    def __post_init__(self) -> None:
        if not self.aggregators:
            raise UserError("aggregators: none is given.")
        limits = {
            "seeds": (1, 1000),
            "jobs": (1, 1000),
            "cpus": (1, 1000),
            "first_seed": (0, 2**32 - 1),
            "gpus": (0, 100),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise UserError(f"{name}: {getattr(self, name)} is not allowed; it must be between {least} and {most}.")
        if self.first_seed + self.seeds > 2**32:
            raise UserError(
                f"first_seed: {self.first_seed} is too high for {self.seeds} seeds; the last one must be below 2**32."
            )
        others = ("address", "cpus", "gpus") if self.launcher == "local" else ("jobs",)
        for field in dataclasses.fields(self):
            if field.name in others and getattr(self, field.name) != field.default:
                instead = "local" if self.launcher == "ray" else "ray"
                raise UserError(f"{field.name}: {getattr(self, field.name)!r} is for --launcher {instead}.")


def command_compare(arguments: Sequence[str]) -> int:
    """Run the comparison and report on it. Returns the exit code: 1 where a run failed."""
    from mtrl_imgrad.envs import expand_tasks

    options, runs = planned(arguments)
    out, at_once = runs[0].folder.parent, min(options.jobs, len(runs))
    with told_as_user_errors():
        expand_tasks(runs[0].config.benchmark.tasks)
        for run in runs:
            check_place("out", run.folder)
    on_cluster = options.launcher == "ray"
    config = runs[0].config
    divided = flags_of_share(options.cpus, config) if on_cluster else share_of_machine(at_once, config)
    if options.dry_run:
        tell_estimate(runs, at_once, divided)
        return 0
    logs = out / "logs"
    try:
        with contextlib.ExitStack() as open_while_running, told_as_user_errors():
            start: Callable[[PlannedRun], StartedRun] = functools.partial(start_here, divided=divided, logs=logs)
            if on_cluster:  # how many run at once is Ray's to say
                cluster = on_ray(options.address, options.cpus, options.gpus, divided, logs)
                start, at_once = open_while_running.enter_context(cluster), len(runs)
            make_folder("out", out)
            lock = FolderLock(out, "out")
            open_while_running.callback(lock.release)
            tell_start(runs, out, arguments)
            progress = run_all(runs, start, at_once, open_while_running.enter_context(progress_view(runs)))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for name, reason in progress.reasons.items():
        print(f"{PROGRAM}: {name} failed, {reason}; see {logs / f'{name}.log'}", file=sys.stderr)
    if progress.of("finished"):
        with told_as_user_errors():
            print(console_text(write_report([run.folder for run in progress.of("finished")], out / "report")))
    return 1 if progress.reasons else 0


def planned(arguments: Sequence[str]) -> tuple[CompareOptions, list[PlannedRun]]:
    """The options of a command line, and the runs that it asks for.

    Raises:
        UserError: something in it is not allowed.
    """
    own, flags = split(arguments)
    options: CompareOptions = parse(CompareOptions, own, "compare", HELP, switches=True)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = plan(options.aggregators, seeds, Path(options.out), flags)
    if not options.out:
        own = f"-{method_name(runs[0].config).replace(':', '.')}-s{runs[0].config.seed}"
        out = Path("runs", f"compare-{run_name(runs[0].config).removesuffix(own)}")
        runs = [dataclasses.replace(run, folder=out / run.name) for run in runs]
    return options, runs


def tell_start(runs: Sequence[PlannedRun], out: Path, arguments: Sequence[str]) -> None:
    """Say what there is to do, and keep the command beside the runs."""
    states: list[str] = []
    for run in runs:
        try:
            states.append(run.state())
        except ValueError:
            states.append("damaged")  # told when its turn comes
    print(f"{len(runs)} runs in {out}: {', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))}")
    with (out / "command.txt").open("a") as file:
        file.write(f"{command_line([sys.argv[0], 'compare', *arguments])}\n")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The comparison's own options, and those of `train`.

    Raises:
        UserError: an option of `train` that each run gets from the comparison.
    """
    names = {field.name for field in dataclasses.fields(CompareOptions)} | {"help"}
    own: list[str] = []
    flags: list[str] = []
    target = own
    for argument in arguments:
        if argument.startswith("--") or argument == "-h":
            name = argument.lstrip("-").partition("=")[0]
            known = names | {*field_names(Config), "config", "benchmark", "wandb"}
            if name.partition(".")[0] not in OWN and name.replace("-", "_") not in known:
                near = difflib.get_close_matches(name.replace("-", "_"), sorted(known), 1, 0.0)[0]
                raise UserError(
                    f"--{name}: there is no such option; the nearest is --{near}.\nSee `{PROGRAM} compare --help`."
                )
            if name.partition(".")[0] in OWN:
                raise UserError(f"--{name}: a comparison gives this to its runs; see `{PROGRAM} compare --help`.")
            target = own if name.replace("-", "_") in names or argument == "-h" else flags
        target.append(argument)
    return own, flags


def tell_estimate(runs: Sequence[PlannedRun], at_once: int, divided: Sequence[str]) -> None:
    """The runs, what has been done of them, and about how long the rest will take: one run of each algorithm is
    measured, as aggregators differ little."""
    with told_as_user_errors():
        states = {run.name: run.state() for run in runs}
    left = [run for run in runs if states[run.name] != "finished"]
    first = {run.config.algorithm: run for run in reversed(left)}
    costs = {algorithm: measure(run, at_once, divided) for algorithm, run in first.items()}
    seconds = {run.name: costs[run.config.algorithm].seconds(run, run.step()) for run in left}
    width = max(len(run.name) for run in runs)
    for run in runs:
        minutes = f"{seconds[run.name] / 60:7.1f} min" if run.name in seconds else ""
        print(f"{run.name:<{width}}  {states[run.name]:<11}  {minutes}".rstrip())
    for algorithm, cost in costs.items():
        print(
            f"measured with {first[algorithm].method}: start {cost.start:.0f} s, "
            f"vector step {1000 * cost.step:.1f} ms, update {1000 * cost.update:.1f} ms"
        )
    if left:
        print(f"about {sum(seconds.values()) / at_once / 3600:.1f} hours, {at_once} at once")
