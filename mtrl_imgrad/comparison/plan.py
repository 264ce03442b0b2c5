"""Which runs a comparison consists of, and what has been done of each."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mtrl_imgrad.config import BASELINES, Config, to_dict, uses
from mtrl_imgrad.files import is_locked
from mtrl_imgrad.overlays import fields_of, parse_config, refuse_changes
from mtrl_imgrad.parsing import UserError
from mtrl_imgrad.run_folder import read_run_folder

LONGEST_ROW = 2**18
"""Bytes from the end of a file in which its last row is looked for; one of MT50 has 15,000."""
State = Literal["to do", "interrupted", "running", "finished", "failed"]


@dataclass(frozen=True)
class PlannedRun:
    """One aggregator and seed.

    Attributes:
        name: of its folder, `<method>-s<seed>`.
        folder: where it is trained.
        method: how the command line names the aggregator or baseline.
        flags: of `mtrl-imgrad train`, without the folder.
        config: what the flags mean.
    """

    name: str
    folder: Path
    method: str
    flags: tuple[str, ...]
    config: Config

    @property
    def last_step(self) -> int:
        """Simulator steps per task at the last vector step."""
        return self.config.sac.steps // self.config.vector_step * self.config.vector_step

    def command(
        self, divided: Sequence[str], place: str | None = None, flags: Sequence[str] | None = None
    ) -> list[str]:
        """Arguments of `mtrl-imgrad` that start the run or go on with it.

        Args:
            divided: flags with this run's share of the machine. A resumed run keeps what it had, as another number of
                threads rounds differently.
            place: the run folder where it is trained, if not here.
            flags: that mean the same as the run's there.
        """
        place, flags = place or str(self.folder), self.flags if flags is None else flags
        if (self.folder / "config.yaml").exists():
            return ["train", "--resume", place, *flags]
        return ["train", *flags, "--run-dir", place, *divided]

    def state(self) -> State:
        """What has been done of it.

        Raises:
            UserError: the folder holds another run.
            ValueError: it cannot be read.
        """
        if not (self.folder / "config.yaml").exists():
            return "to do"
        found = read_run_folder(self.folder)
        try:
            refuse_changes(dict(found.settings), to_dict(self.config))
            if found.config.sac.steps > self.config.sac.steps:
                raise UserError(f"sac.steps: the run has {found.config.sac.steps}, more than {self.config.sac.steps}.")
        except UserError as error:
            raise UserError(f"out: {self.folder} is a run of another comparison; {error}") from None
        if is_locked(self.folder):
            return "running"
        # The final evaluation comes after the last checkpoint, which need not be kept, e.g. among published results.
        saved = not self.config.eval.final and self.last_step <= found.checkpoint_step
        ended = found.planned_steps == self.last_step and (found.final_success is not None or saved)
        return "finished" if ended else "interrupted"

    def step(self) -> int:
        """Simulator steps per task of the newest checkpoint, 0 without one."""
        return read_run_folder(self.folder).checkpoint_step if (self.folder / "config.yaml").exists() else 0


def last_row(path: Path) -> dict[str, str]:
    """The last whole row of a CSV file that may just be written; empty where there is none."""
    try:
        with path.open("rb") as file:
            header = file.readline()
            file.seek(max(len(header), file.seek(0, os.SEEK_END) - LONGEST_ROW))
            *rows, _ = file.read().split(b"\n")
        last = [line.decode(errors="replace") for line in (header, *rows[-1:])]
        return dict(zip(*csv.reader(last), strict=False)) if rows else {}
    except (OSError, ValueError, csv.Error):  # the last two: lines that are none of a table
        return {}


def plan(methods: Sequence[str], seeds: Sequence[int], out: Path, flags: Sequence[str]) -> list[PlannedRun]:
    """All runs, seed by seed, so that a comparison that is stopped early has every method equally often.

    Args:
        methods: `name` or `name,field=value,...` of aggregators, and names of baselines.
        seeds: of the runs.
        out: the folder of their folders.
        flags: of `mtrl-imgrad train`, the same for all; a baseline is not given those that only the aggregators use,
            nor they those of the baselines.

    Raises:
        UserError: a method or a flag is not allowed, or two methods are the same.
    """
    runs: list[PlannedRun] = []
    configs: dict[str, Config] = {}
    algorithms = {algorithm_of(method) for method in methods}
    for seed in seeds:
        for method in methods:
            common = flags_for(algorithm_of(method), flags, algorithms)
            own = (*common, *method_flags(method), "--seed", str(seed))
            name = f"{method.replace(':', '.')}-s{seed}"
            if method not in configs:  # parsing takes longer than everything else here
                configs[method] = parse_config(own)
            runs.append(PlannedRun(name, out / name, method, own, replace(configs[method], seed=seed)))
    first = runs[: len(methods)]
    for number, run in enumerate(first):
        for other in first[:number]:
            if to_dict(run.config) == to_dict(other.config):
                raise UserError(f"aggregators: {other.method!r} and {run.method!r} are the same.")
    return runs


def algorithm_of(method: str) -> str:
    """The `--algorithm` of a method."""
    name = method.partition(",")[0]
    return name if name in BASELINES else "mtsac"


def flags_for(algorithm: str, flags: Sequence[str], algorithms: Collection[str]) -> list[str]:
    """Flags, with their values, without those that only others of the algorithms use."""
    kept: list[str] = []
    keep = True
    for word in flags:
        if word.startswith("--"):
            (name,) = fields_of([word])
            keep = uses(algorithm, name) or not any(uses(other, name) for other in algorithms)
        if keep:
            kept.append(word)
    return kept


def method_flags(method: str) -> list[str]:
    """Flags of `mtrl-imgrad train` for an aggregator or baseline with fields, e.g. `cagrad,c=0.5`.

    Raises:
        UserError: it is not written that way.
    """
    name, *fields = method.split(",")
    option, section = ("--aggregator", "--aggregator") if name not in BASELINES else ("--algorithm", "--sb3")
    flags = [option, name]
    for field in fields:
        key, equals, value = field.partition("=")
        if not (name and key and equals and value):
            raise UserError(f"aggregators: {method!r} is not allowed; it must be NAME or NAME,FIELD=VALUE,...")
        flags += [f"{section}.{key}", value]
    return flags
