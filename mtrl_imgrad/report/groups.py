"""Which runs may stand in one table, and which of them are seeds of the same thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrl_imgrad.config import uses
from mtrl_imgrad.overlays import CHANGEABLE
from mtrl_imgrad.run_folder import RunFolder

IGNORED = ("seed", *CHANGEABLE)
"""Fields in which runs of one group may differ: the seed, and what a resume may change because it does not change what
a run learns. Among these is `sac.steps`, which `MUST_AGREE` compares."""

MUST_AGREE: dict[str, Callable[[RunFolder], Any]] = {
    "protocol": lambda run: run.config.protocol,
    "tasks": lambda run: ", ".join(sorted(run.tasks)),
    "reward": lambda run: run.config.benchmark.reward,
    "budget (sac.steps)": lambda run: run.config.sac.steps,
    "Meta-World version": lambda run: run.package("metaworld"),
    "MuJoCo version": lambda run: run.package("mujoco"),
}
"""What all runs of one table have in common; success under different values of these is not comparable."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: the aggregator's name (or the baseline's), with the fields that tell it from others of that name.
        runs: by seed, ascending.
    """

    label: str
    runs: Mapping[int, RunFolder]


@dataclass(frozen=True)
class LeftOut:
    """A folder that the report does not use, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Selection:
    """The runs of a report.

    Attributes:
        groups: sorted by label, never by result.
        left_out: the other run folders.
        other_differences: fields besides the aggregator's in which groups that have them differ, with their values.
    """

    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...]
    other_differences: Mapping[str, Mapping[str, str]]

    @property
    def runs(self) -> list[RunFolder]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs.values()]


def select(runs: Sequence[RunFolder]) -> Selection:
    """Take the largest set of runs that agree in `MUST_AGREE` (of equally large ones the newest), and group it."""
    consistent, others = _largest_consistent(runs)
    by_settings: dict[tuple[tuple[str, str], ...], dict[int, RunFolder]] = {}
    for run in sorted(consistent, key=lambda run: str(run.path)):
        seeds = by_settings.setdefault(tuple(sorted(_settings(run).items())), {})
        known = seeds.get(run.config.seed)
        if known:
            further, behind = sorted((known, run), key=_progress, reverse=True)
            seeds[run.config.seed] = further
            others.append(
                LeftOut(behind.path, f"the same settings and seed as {further.path}, which is as far or further")
            )
        else:
            seeds[run.config.seed] = run
    labels = _labels([dict(settings) for settings in by_settings])
    groups = [
        Group(label, dict(sorted(seeds.items()))) for label, seeds in zip(labels, by_settings.values(), strict=True)
    ]
    groups.sort(key=lambda group: group.label)
    left_out = sorted(others, key=lambda item: str(item.path))
    return Selection(tuple(groups), tuple(left_out), _other_differences(groups))


def sharing(steps: Mapping[int, Set[float]]) -> list[int]:
    """Seeds, ascending, of runs that have a step in common, so that their mean over seeds exists: all seeds where all
    have one, else those with the most steps first, each that shares one with all before it."""
    kept: list[int] = []
    common: Set[float] = frozenset()
    for seed in sorted(steps, key=lambda seed: (-len(steps[seed]), seed)):
        still = steps[seed] & common if kept else steps[seed]
        if still:
            kept.append(seed)
            common = still
    return sorted(kept)


def _largest_consistent(runs: Sequence[RunFolder]) -> tuple[list[RunFolder], list[LeftOut]]:
    facts = [{name: fact(run) for name, fact in MUST_AGREE.items()} for run in runs]
    keys = [tuple(fact.values()) for fact in facts]
    newest = {key: max(run.modified for run, mine in zip(runs, keys, strict=True) if mine == key) for key in keys}
    sizes = Counter(keys)
    chosen = max(sizes, key=lambda key: (sizes[key], newest[key]))
    wanted = dict(zip(MUST_AGREE, chosen, strict=True))
    kept: list[RunFolder] = []
    left_out: list[LeftOut] = []
    for run, fact in zip(runs, facts, strict=True):
        differing = [name for name in MUST_AGREE if fact[name] != wanted[name]]
        if differing:
            parts = (f"{name} {_shown(fact[name])} instead of {_shown(wanted[name])}" for name in differing)
            left_out.append(LeftOut(run.path, "; ".join(parts)))
        else:
            kept.append(run)
    return kept, left_out


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _progress(run: RunFolder) -> tuple[bool, bool, int, float]:
    return (run.final_success is not None, run.finished, run.last_step, run.modified)


def _settings(run: RunFolder) -> dict[str, str]:
    """Everything that a group has in common: dotted field -> value as text; without fields that its algorithm does not
    read."""
    fields = {
        name: value
        for name, value in _flat(run.settings).items()
        if name != "algorithm"
        and uses(run.config.algorithm, name)
        and not any(name == ignored or name.startswith(f"{ignored}.") for ignored in IGNORED)
    }
    # MT10 and its ten tasks are the same.
    return fields | {"benchmark.tasks": " ".join(run.tasks), "name": run.method}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    fields: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            fields |= _flat(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return fields


def _labels(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The name of each group; where several have it, with the fields in which they differ."""
    labels: list[str] = []
    for mine in settings:
        namesakes = [other for other in settings if other["name"] == mine["name"]]
        differing = [field for field in _differing(namesakes) if field in mine]
        labels.append(" ".join([mine["name"], *(f"{_short(field)}={mine[field]}" for field in differing)]))
    return labels


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    fields = dict.fromkeys(field for one in settings for field in one)
    return [field for field in fields if len({one.get(field) for one in settings}) > 1]


def _short(field: str) -> str:
    return field.removeprefix("aggregator.")


def _other_differences(groups: Sequence[Group]) -> dict[str, dict[str, str]]:
    settings = {group.label: _settings(next(iter(group.runs.values()))) for group in groups}
    fields = dict.fromkeys(field for one in settings.values() for field in one)
    by_field = {field: {label: one[field] for label, one in settings.items() if field in one} for field in fields}
    return {
        field: values
        for field, values in by_field.items()
        if len(set(values.values())) > 1 and field != "name" and not field.startswith("aggregator.")
    }
