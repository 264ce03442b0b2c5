"""What was compared: the settings of each group, and what their differences mean for a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtrl_imgrad.config import BASELINES, uses
from mtrl_imgrad.report.groups import Group, Selection
from mtrl_imgrad.report.results import Pair, Results
from mtrl_imgrad.report.tables import Table
from mtrl_imgrad.run_folder import RunFolder

OF_THE_MACHINE = ("device", "precision", "compile", "threads")
"""How a run computes, which changes its speed, and its numbers by rounding."""


def settings_table(results: Results) -> Table:
    """The fields that tell what each group is: all of its aggregator, or of the section `sb3` for a baseline, and each
    in which groups that read it differ."""
    differing = results.selection.other_differences
    rows: list[tuple[str, str]] = []
    for group in results.selection.groups:
        fields = own_fields(_first(group))
        fields |= {name: values[group.label] for name, values in differing.items() if group.label in values}
        rows.append((group.label, ", ".join(f"{name}={value}" for name, value in fields.items())))
    note = (
        "All fields of the aggregator, or of the baseline, and every other field in which groups that read it differ."
    )
    return Table(("", "settings"), tuple(rows), (f"{note} The rest is in config.yaml of each run.",))


def own_fields(run: RunFolder) -> dict[str, str]:
    """Dotted field -> value as text, of the aggregator, or of the baseline and its section."""
    if run.config.algorithm == "mtsac":
        rule = dict(run.settings["aggregator"])
        return {"aggregator": str(rule.pop("name"))} | _fields(rule, "aggregator")
    return {"algorithm": run.config.algorithm} | _fields(run.settings["sb3"], "sb3")


def baseline_notices(selection: Selection) -> list[str]:
    """What to know before a baseline is compared with anything."""
    baselines = [group for group in selection.groups if _first(group).config.algorithm in BASELINES]
    if not baselines:
        return []
    values: list[str] = []
    for group in baselines:
        given = ", ".join(f"{name} {value}" for name, value in _fields(_first(group).settings["sb3"]).items())
        values.append(f"{group.label}: {given}")
    return [
        "Baselines are stable-baselines3's SAC with its own network, replay, batch size, discount, learning rate and "
        "temperature, not those of the aggregators' runs; a difference from a baseline is one of all of these. "
        f"{'; '.join(values)}."
    ]


def what_a_seed_fixes(pairs: Sequence[Pair], groups: Sequence[Group]) -> str:
    """Why runs are compared by seed: goals are the same, initial networks only where algorithm and network are."""
    start = {group.label: _initial_networks(_first(group)) for group in groups}
    same = [start[pair.a] == start[pair.b] for pair in pairs]
    if all(same):
        fixed = "goals and initial networks"
    elif any(same):
        fixed = "goals, and initial networks where both groups have the same algorithm and network"
    else:
        fixed = "goals, but not initial networks, as the groups differ in algorithm or network"
    return (
        f"A seed fixes {fixed}. What it makes easier or harder for both groups cancels in the difference. Only runs "
        "with the same seed and the same goals are paired."
    )


def machine(runs: Sequence[RunFolder]) -> str:
    """The fields of `OF_THE_MACHINE` in which runs that read them differ; empty where there are none."""
    parts: list[str] = []
    for name in OF_THE_MACHINE:
        found = {run.settings[name] for run in runs if uses(run.config.algorithm, name)}
        if len(found) > 1:
            parts.append(f"{name}: {' and '.join(map(str, sorted(found)))}")
    return "; ".join(parts)


def _first(group: Group) -> RunFolder:
    return next(iter(group.runs.values()))


def _fields(section: Mapping[str, Any], name: str = "") -> dict[str, str]:
    return {
        f"{name}.{key}" if name else key: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in section.items()
    }


def _initial_networks(run: RunFolder) -> tuple[Any, ...]:
    """Runs that agree in this, in tasks and in seed begin with the same parameters."""
    ours = run.config.algorithm == "mtsac"
    return run.config.algorithm, run.settings["network"] if ours else run.settings["sb3"]["net_arch"]
