"""The command line: `mtrl-imgrad train | evaluate | record | compare | report | bench | list`.

A user's mistake ends with exit code 2 and at most two lines on stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import psutil
import tyro

from mtrl_imgrad.aggregators import AGGREGATORS
from mtrl_imgrad.bench.command import command_bench
from mtrl_imgrad.comparison.command import command_compare
from mtrl_imgrad.config import to_dict
from mtrl_imgrad.envs.worker_pool import WorkerError
from mtrl_imgrad.files import is_storage_failure
from mtrl_imgrad.interruption import Stopped
from mtrl_imgrad.learner import NonFiniteError
from mtrl_imgrad.overlays import configs_folder, parse_config, refuse_changes, refuse_fewer_steps, take_options
from mtrl_imgrad.parsing import PROGRAM, UserError, parse, printable, told_as_user_errors
from mtrl_imgrad.record import command_record
from mtrl_imgrad.report.command import command_report


def command_train(arguments: Sequence[str]) -> int:
    """Returns the exit code: 130 or 143 where SIGINT or SIGTERM ended it."""
    from mtrl_imgrad.kept_checkpoints import newest_step
    from mtrl_imgrad.run_description import read_config
    from mtrl_imgrad.tensorboard import storage_failures_told_once
    from mtrl_imgrad.trainer import open_run

    taken, rest = take_options(arguments, ("resume",))
    resume = Path(taken[-1][1]) if taken else None
    base = None
    if resume:
        with told_as_user_errors():
            base = to_dict(read_config(resume))
    config = parse_config(rest, base)
    if base:
        refuse_changes(base, to_dict(config))
    if resume:
        with told_as_user_errors():
            refuse_fewer_steps(config.sac.steps, newest_step(resume))
    with told_as_user_errors():
        run, loop = open_run(config, resume, started=psutil.Process().create_time())
    with storage_failures_told_once(), run, run.interruption.by_signals():
        try:
            loop(run)
        except Stopped as stop:
            how = f"go on with --resume {shlex.quote(str(run.folder))}"
            if not config.checkpoint.replay:
                how = "without the replay (checkpoint.replay False) it cannot go on"
            print(f"{PROGRAM}: stopped; {how}", file=sys.stderr)
            return 128 + stop.number
    return 0


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a run's checkpoint: every goal of every task once, with the deterministic policy. Writes RUN/eval.csv,
    or RUN/eval_best.csv."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    checkpoint: str = "newest"
    """newest, the step of one that was kept, or best: the one whose evaluation during training was highest. That is for
    using the policy; its success is biased upwards by the choice and belongs in no comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto is cuda where there is one, else cpu."""


def command_evaluate(arguments: Sequence[str]) -> None:
    from mtrl_imgrad.agent import evaluate_run
    from mtrl_imgrad.evaluation import table

    options: EvaluateOptions = parse(EvaluateOptions, arguments, "evaluate")
    with told_as_user_errors():
        episodes, path, protocol = evaluate_run(options.run, options.device, options.checkpoint)
    print(table(episodes))
    print(f"{path}: step {episodes[0].step:,}, protocol {protocol}, every goal once, deterministic policy")


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """Show what there is to choose from."""

    what: Annotated[Literal["tasks", "aggregators", "configs"], tyro.conf.Positional]
    """Tasks and task sets, aggregators with their papers, needs and fields, or shipped configurations."""


def command_list(arguments: Sequence[str]) -> None:
    options: ListOptions = parse(ListOptions, arguments, "list")
    if options.what == "tasks":
        from mtrl_imgrad.envs import task_sets

        for name, tasks in task_sets().items():
            print(f"{name}: {' '.join(tasks)}")
    elif options.what == "aggregators":
        from mtrl_imgrad.listing import print_aggregators

        print_aggregators(AGGREGATORS)
    else:
        for path in sorted(configs_folder().glob("*.yaml")):
            print(f"{path.stem:<14} {path.read_text().splitlines()[0].removeprefix('#').strip()}")


COMMANDS = {
    "train": command_train,
    "evaluate": command_evaluate,
    "record": command_record,
    "compare": command_compare,
    "report": command_report,
    "bench": command_bench,
    "list": command_list,
}
USAGE = f"""usage: {PROGRAM} COMMAND ...

  train      train an agent:                {PROGRAM} train --config quickstart
  evaluate   evaluate a run on every goal:  {PROGRAM} evaluate runs/NAME
  record     make videos of its episodes:   {PROGRAM} record runs/NAME
  compare    train several aggregators:     {PROGRAM} compare --config quickstart --seeds 5 --jobs 2
  report     compare runs on success:       {PROGRAM} report runs --out report
  bench      measure what things cost:      {PROGRAM} bench envs|solvers|update
  list       show what there is to choose:  {PROGRAM} list tasks|aggregators|configs

{PROGRAM} COMMAND --help explains every field."""


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks. By default it returns them to the kernel, and every update faults its
    temporaries in again, page by page: 13 % of a quick-start update on a virtual machine. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for a user's mistake, 1 where a worker or training failed."""
    keep_freed_memory()
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1, 0.0)[0]
            raise UserError(f"{command!r} is no command; the nearest is {near!r}.\nSee `{PROGRAM} --help`.")
        return COMMANDS[command](rest) or 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        print(printable(f"{PROGRAM}: {error}"), file=sys.stderr)
        return 2
    except (WorkerError, NonFiniteError) as error:
        print(printable(f"{PROGRAM}: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        if not is_storage_failure(error):
            raise
        what = f"{error.filename} could not be written" if error.filename else "a file could not be written"
        print(f"{PROGRAM}: {what} ({error.strerror}); earlier files and checkpoints are whole", file=sys.stderr)
        return 1
