"""From YAML overlays and command-line flags to a `Config`.

Overlays become flags, and all flags go through one parser, so that there is one grammar and one style of error; later
ones win.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from mtrl_imgrad.aggregators import AGGREGATORS, resolve
from mtrl_imgrad.config import Config, uses
from mtrl_imgrad.field_types import spelled
from mtrl_imgrad.parsing import PROGRAM, UserError, parse, told_as_user_errors
from mtrl_imgrad.strict_yaml import read_mapping

TRAIN_HELP = """Train a multi-task SAC agent, or stable-baselines3's SAC as a baseline, on Meta-World.

Overlays come first and are merged in the order given; every other flag wins over them:
  --config NAME|PATH        a YAML overlay: a file, or one of those that `mtrl-imgrad list configs` shows
  --benchmark NAME          MT10, MT25, MT50 or a task; short for --benchmark.tasks NAME
  --aggregator NAME         a rule that `mtrl-imgrad list aggregators` shows, or module:Class; its fields become
  --aggregator.FIELD
  --wandb                   short for --log.wandb True
  --resume RUN              go on with a run folder from its newest checkpoint; of its configuration, how long and how
  to report may change

Lengths and intervals are in simulator steps per task.

Example: mtrl-imgrad train --config mt10 --aggregator imgrad --aggregator.c 0.4 --seed 3"""
CHANGEABLE = (
    *("run_dir", "device", "threads", "compile", "cuda_graph", "jacobian", "eval.every", "eval.final", "log"),
    *("checkpoint", "sac.steps", "sac.nan_policy", "envs.workers", "envs.fast", "envs.self_check"),
)
"""What may differ from the stored configuration on a resume."""


def configs_folder() -> Path:
    """Where the overlays are: inside an installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


def read_overlay(name: str) -> dict[str, Any]:
    """A YAML overlay by path or by the name of a shipped one.

    Raises:
        UserError: there is no such file, or it is not a YAML mapping.
    """
    shipped = {path.stem: path for path in sorted(configs_folder().glob("*.yaml"))}
    there = os.path.isfile(name)  # noqa: PTH113  (Path's own raises where a name is too long)
    path = Path(name) if there else shipped.get(name.removesuffix(".yaml"))
    if path is None:
        near = difflib.get_close_matches(Path(name).stem, shipped, 1, 0.0)
        raise UserError(f"config: no file and no shipped configuration is named {name!r}; the nearest is {near[0]!r}.")
    try:
        overlay = read_mapping(path)
    except (ValueError, OSError) as error:
        raise UserError(f"config: {path}: {error}.") from None
    for field in dataclasses.fields(Config):
        if field.default_factory is not dataclasses.MISSING and not isinstance(overlay.get(field.name, {}), dict):
            raise UserError(f"{field.name}: {overlay[field.name]!r} must be a mapping of this section's fields.")
    return overlay


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one overlay over another. Another aggregator replaces the former with its fields."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        replaces = (
            key == "aggregator"
            and isinstance(value, dict)
            and isinstance(under, dict)
            and value.get("name", under.get("name")) != under.get("name")
        )
        merged[key] = (
            merge(under, value) if isinstance(under, dict) and isinstance(value, dict) and not replaces else value
        )
    return merged


def flags_of(overlay: dict[str, Any], prefix: str = "--") -> list[str]:
    """An overlay as command-line flags."""
    flags: list[str] = []
    for key, value in overlay.items():
        if isinstance(value, dict):
            flags += flags_of(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            words = [str(item) for item in value]
            if options := [word for word in words if word.startswith("--")]:
                raise UserError(f"{prefix[2:]}{key}: {options[0]!r} cannot be a value; it looks like an option.")
            flags += [f"{prefix}{key}", *words]
        else:
            flags.append(f"{prefix}{key}={value}")
    return flags


def take_options(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Split `--name value` and `--name=value` of the given names, in order, from the other arguments.

    Raises:
        UserError: a value is missing.
    """
    taken: list[tuple[str, str]] = []
    rest: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in names:
            rest.append(argument)
        elif equals and value:
            taken.append((name, value))
        elif not equals and left and not left[0].startswith("--"):
            taken.append((name, left.pop(0)))
            if left and not left[0].startswith("--"):
                raise UserError(f"--{name}: one value is allowed, but {left[0]!r} follows {taken[-1][1]!r}.")
        else:
            raise UserError(f"--{name}: a value is missing.")
    return taken, rest


def merged_overlays(arguments: Sequence[str], base: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The overlays of a command line as one, and its other flags.

    Args:
        arguments: the command line after `train`.
        base: an overlay below all others.

    Raises:
        UserError: an overlay cannot be read.
    """
    taken, flags = take_options(arguments, ("config", "benchmark", "aggregator"))
    flags = ["--log.wandb=True" if flag == "--wandb" else flag for flag in flags]
    overlay: dict[str, Any] = base or {}
    for name, value in taken:
        if name == "config":
            overlay = merge(overlay, read_overlay(value))
        elif name == "benchmark":
            overlay = merge(overlay, {"benchmark": {"tasks": [value]}})
        elif value != overlay.get("aggregator", {}).get("name"):  # naming the chosen one again changes nothing
            shipped = value in AGGREGATORS and (configs_folder() / f"{value}.yaml").is_file()
            overlay = merge(overlay, read_overlay(value) if shipped else {"aggregator": {"name": value}})
    return overlay, flags


def parse_config(arguments: Sequence[str], base: dict[str, Any] | None = None) -> Config:
    """A configuration from overlays and flags.

    Args:
        arguments: the command line after `train`.
        base: an overlay below all others.

    Raises:
        UserError: something in them is not allowed, or a flag names a field that the algorithm does not use.
        SystemExit: `--help` was asked for and printed.
    """
    overlay, flags = merged_overlays(arguments, base)
    _refuse_lists(overlay, Config)
    fields = dict(overlay.get("aggregator", {}))
    with told_as_user_errors():
        rule = resolve(str(fields.pop("name", "imgrad")))
        default = dataclasses.field(default_factory=rule)
    typed = dataclasses.make_dataclass("Config", [("aggregator", rule, default)], bases=(Config,), frozen=True)
    typed.__doc__ = Config.__doc__
    tokens = flags_of(overlay | {"aggregator": fields}) + flags
    _refuse_unknown(tokens, field_names(typed))
    words = [re.sub(r"^(--[^=]+=)?(true|false)$", lambda m: f"{m[1] or ''}{m[2].title()}", token) for token in tokens]
    config: Config = parse(typed, words, "train", TRAIN_HELP)
    named = [f"--{name}" for name, _ in take_options(arguments, ("aggregator",))[0]]
    _refuse_unused([*named, *flags], config.algorithm)
    return config


def field_names(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration class."""
    names: list[str] = []
    for field in dataclasses.fields(kind):
        nested = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        names += field_names(nested, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
    return names


def fields_of(flags: Sequence[str]) -> list[str]:
    """The fields that flags name."""
    return [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]


def _refuse_unused(flags: Sequence[str], algorithm: str) -> None:
    """A flag that would change nothing is a mistake; what an overlay says of other algorithms is not."""
    for name in fields_of(flags):
        if not uses(algorithm, name):
            instead = "" if algorithm == "mtsac" else "; its own settings are the fields --sb3.*"
            raise UserError(f"{name}: --algorithm {algorithm} does not use this field{instead}.")


def _refuse_unknown(tokens: Sequence[str], names: Sequence[str]) -> None:
    for name in fields_of(tokens):
        if name not in (*names, "help"):
            near = difflib.get_close_matches(name, names, 1, 0.0)[0]
            raise UserError(
                f"{name or '--'}: there is no such field; the nearest is --{near}.\nSee `{PROGRAM} train --help`."
            )


def _refuse_lists(overlay: dict[str, Any], kind: Any, prefix: str = "") -> None:
    """An overlay's list where a field takes one value would be an unknown argument, and null would be the word None."""
    hints = get_type_hints(kind)
    for name, value in overlay.items():
        hint = hints.get(name)
        if isinstance(value, dict) and dataclasses.is_dataclass(hint):
            _refuse_lists(value, hint, f"{prefix}{name}.")
        elif (isinstance(value, (list, dict)) and hint in (int, float, bool, str)) or (value is None and hint is str):
            raise UserError(f"{prefix}{name}: {value!r} is not allowed; it must be {spelled(hint)}.")


def refuse_fewer_steps(wanted: int, trained: int) -> None:
    """A run that was trained for `trained` simulator steps per task must not say that it has fewer."""
    if wanted < trained:
        raise UserError(f"sac.steps: the run has a checkpoint at step {trained}, so {wanted} is too few to resume it.")


def refuse_changes(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> None:
    """A resumed run must stay the run that it was."""
    for key, value in wanted.items():
        name = f"{prefix}{key}"
        if name in CHANGEABLE or value == stored.get(key):
            continue
        if isinstance(value, dict) and isinstance(stored.get(key), dict):
            refuse_changes(stored[key], value, f"{name}.")
        else:
            raise UserError(
                f"{name}: the run has {stored.get(key)!r}, and a resumed run cannot change it to {value!r}."
            )
