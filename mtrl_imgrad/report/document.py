"""What a report says and in which order; `page` and `markdown` write it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtrl_imgrad.report import tables
from mtrl_imgrad.report.figures import Drawn
from mtrl_imgrad.report.results import Results
from mtrl_imgrad.report.settings import baseline_notices, machine, settings_table, what_a_seed_fixes
from mtrl_imgrad.report.tables import Table
from mtrl_imgrad.run_folder import RunFolder


@dataclass(frozen=True)
class Commands:
    """Command lines, as they were typed, shown when asked for."""

    title: str
    lines: tuple[str, ...]


Part = str | Table | Drawn | Commands
"""A part of a section: a paragraph, a table, a figure, or commands."""


@dataclass(frozen=True)
class Section:
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    """A report without its form.

    Attributes:
        title: of the page.
        facts: name -> value, what all numbers are about.
        notices: what a reader must know before any number, such as which runs were left out.
        sections: the rest, in order.
    """

    title: str
    facts: Mapping[str, str]
    notices: tuple[str, ...]
    sections: tuple[Section, ...]


def document(results: Results, figures: Sequence[Drawn]) -> Document:
    """The report of these results."""
    drawn = {figure.name: figure for figure in figures}
    goals = sorted({_goals_per_point(run) for run in results.selection.runs if run.training_rows})
    return Document(
        title=f"Success on {_benchmark(results)}",
        facts=_facts(results),
        notices=tuple(_notices(results)),
        sections=tuple(
            section
            for section in (
                _section("Settings", settings_table(results)),
                _section("Final success", _final_text(results), tables.final_table(results), drawn.get("final")),
                _section("Success against steps", _curve_text(goals), drawn.get("curves"), drawn.get("curves_by_seed")),
                _section("Steps to reach a success rate", _any_rows(tables.reach_table(results))),
                _section("Tasks", _any_columns(tables.task_table(results)), drawn.get("tasks")),
                _section("Differences by seed", *_differences(results), drawn.get("differences")),
                _section("Probability of improvement", *_improvement(results), drawn.get("improvement")),
                _section("Gradients", drawn.get("diagnostics"), drawn.get("weights")),
                _section("Cost", tables.cost_table(results)),
                _section("Runs and commands", tables.run_table(results), *_commands(results)),
            )
            if section
        ),
    )


def _section(title: str, *parts: Part | None) -> Section | None:
    kept = tuple(part for part in parts if part)
    return Section(title, kept) if kept else None


def _benchmark(results: Results) -> str:
    named = " ".join(results.config.benchmark.tasks)
    return named if len(results.config.benchmark.tasks) == 1 else f"{len(results.tasks)} Meta-World tasks"


def _facts(results: Results) -> dict[str, str]:
    config, runs = results.config, results.selection.runs
    seeds = {len(one.group.runs) for one in results.groups}
    machines = machine(runs)
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return {
        "Protocol": f"{config.protocol}: {config.benchmark.reward} reward, episodes of {config.eval.horizon} steps, "
        f"{config.benchmark.goals} goals of each task once, deterministic policy; goals are those of training",
        "Budget": f"{config.sac.steps:,} simulator steps per task, "
        f"{config.sac.steps * len(results.tasks):,} over all tasks",
        "Tasks": f"{len(results.tasks)}: {', '.join(results.tasks)}",
        "Groups": ", ".join(one.label for one in results.groups),
        "Seeds": f"{count} per group, {len(runs)} runs",
        "Versions": f"Meta-World {runs[0].package('metaworld')}, MuJoCo {runs[0].package('mujoco')}, torch "
        + " or ".join(sorted({run.package("torch") for run in runs})),
    } | ({"Computing": machines} if machines else {})


def _notices(results: Results) -> list[str]:
    selection = results.selection
    notices = [f"Left out: {item.path}: {item.reason}." for item in selection.left_out]
    going = [run for run in selection.runs if not run.finished]
    if going:
        notices.append(
            f"Not finished: {len(going)} of {len(selection.runs)} runs. They have no final success yet and count in "
            "the curves only; a group's curve ends where its slowest run is."
        )
    notices += [
        f"Not in the curves: {label} seed {seed}, which was evaluated at none of the steps of the group's other runs."
        for label, curve in results.curves.items()
        for seed in curve.left_out
    ]
    differing = selection.other_differences
    if differing:
        fields = (f"{field} ({', '.join(dict.fromkeys(values.values()))})" for field, values in differing.items())
        notices.append(f"Groups differ in more than their aggregator: {'; '.join(fields)}.")
    return notices + baseline_notices(selection)


def _final_text(results: Results) -> str:
    return (
        "Success of the last checkpoint: the share of all goals that the deterministic policy reaches at some step of "
        "an episode, mean over tasks. It is never the best point of a curve. Groups are in alphabetical order."
    )


def _curve_text(goals: Sequence[int]) -> str:
    if not goals:
        return "No run was evaluated during training (eval.every)."
    counted = " or ".join(map(str, goals))
    return (
        f"Evaluations during training visit {counted} goal{'s' * (goals != [1])} of each task, not all, so points are "
        "coarser than the final success, and may differ from it."
    )


def _goals_per_point(run: RunFolder) -> int:
    first = run.training_rows[0]
    return sum((row["step"], row["task"]) == (first["step"], first["task"]) for row in run.training_rows)


def _any_rows(table: Table) -> Table | None:
    return table if table.rows else None


def _any_columns(table: Table) -> Table | None:
    return table if len(table.columns) > 1 else None


def _differences(results: Results) -> tuple[Part, ...]:
    if not results.pairs:
        return ("There are no two groups with a final success.",)
    text = what_a_seed_fixes(results.pairs, results.selection.groups)
    return (text, *tables.verdict(results.pairs), tables.difference_table(results))


def _improvement(results: Results) -> tuple[Part, ...]:
    if not results.pairs:
        return ()
    text = (
        "The probability that a run of one group beats a run of the other on a task, whatever their seeds, mean over "
        "tasks; a tie counts half. It says how often, not by how much."
    )
    return (text, tables.improvement_table(results))


def _commands(results: Results) -> list[Commands]:
    return [
        Commands(f"{one.label}: commands", tuple(line for run in one.group.runs.values() for line in run.commands))
        for one in results.groups
    ]
