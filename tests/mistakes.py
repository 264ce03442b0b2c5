"""A seeded generator of users' mistakes: command lines and files that are wrong by construction.

Each function makes one kind of mistake and says why it is one. `{run}` in an argument stands for a trained run folder,
`{spoilt}` for a copy of it in which files were replaced.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

import yaml

from mtrl_imgrad.config import Config

Spoil = Callable[[bytes], bytes | None]
"""From a file's content to another one; None removes the file."""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A command line that is wrong.

    Attributes:
        arguments: of `mtrl-imgrad`.
        names: one of these is in the message: the field, option or file that is wrong.
        files: content by name, in the working directory.
        spoilt: what becomes of files of the run folder's copy, by name or pattern.
        baseline: whether that is the run of stable-baselines3's SAC.
        sealed: whether the manifests of its checkpoints vouch for what has become of them.
    """

    arguments: tuple[str, ...]
    names: tuple[str, ...]
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    spoilt: Mapping[str, Spoil] = dataclasses.field(default_factory=dict)
    baseline: bool = False
    sealed: bool = False


def fields(kind: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Type of every field that is no section and not the aggregator, by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= fields(hint, f"{prefix}{name}.")
        elif name != "aggregator":
            found[prefix + name] = hint
    return found


FIELDS = {name: hint for name, hint in fields().items() if not name.startswith("sb3.")}  # mtsac does not read those
INTEGERS = [name for name, hint in FIELDS.items() if int in (hint, *get_args(hint)) and hint != tuple[int, ...]]
FLOATS = [name for name, hint in FIELDS.items() if hint is float]
BOOLS = [name for name, hint in FIELDS.items() if hint is bool]
CHOICES = [name for name, hint in FIELDS.items() if all(isinstance(a, str) for a in get_args(hint)) and get_args(hint)]
CHOICES += ["algorithm"] if "algorithm" not in CHOICES else []
SIGNED = ("network.log_std_min", "network.log_std_max", "sac.target_entropy", "sac.critic_min", "sac.critic_max")
OFTEN_HUGE = ("seed", "envs.goal_seed", "threads", "envs.workers", "envs.envs_per_task", "network.width")
TERMINAL = (
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "a\rb",
    "a\nb\nc\nd",
    "\x9b31m",
    "\u202egnp.exe",
    "\x7f\x08\x08",
    "\t",
)
WORDS = (
    "many",
    "",
    " ",
    "1,5",
    "0x10",
    "\uff11\uff12x",
    "1e",
    "--",
    "3 4",
    "[1]",
    "{}",
    "true1",
    "half",
    "½",
    *TERMINAL,
)
"""No numbers, in no grammar."""
HUGE = (str(10**400), str(2**63), f"9{'0' * 5000}", str(-(10**400)), str(-(2**63) - 1))
LONG = ("x" * 100_000, "é" * 5_000, "\x1b[2J" * 20_000, "a b " * 30_000, "│" * 4_000)


def flag(chance: random.Random, name: str, value: str) -> tuple[str, ...]:
    """A field on the command line, in one of the ways to write it. A value that looks like an option needs the `=`."""
    spelled = name if chance.random() < 0.5 else name.replace("_", "-")
    return (f"--{spelled}={value}",) if value.startswith("-") or chance.random() < 0.5 else (f"--{spelled}", value)


def overlay(name: str, value: object) -> bytes:
    """A YAML file that sets one field."""
    section, _, field = name.rpartition(".")
    return yaml.safe_dump({section: {field: value}} if section else {field: value}, allow_unicode=True).encode()


def set_field(chance: random.Random, name: str, value: str) -> Mistake:
    """Sets one field of `train` wrongly, by a flag or by an overlay, perhaps among flags that are right."""
    more = chance.choice([(), ("--config", "quickstart"), ("--benchmark", "reach-v3"), ("--aggregator", "mean")])
    names = (name, name.replace("_", "-"))
    if chance.random() < 0.5:
        return Mistake(("train", *more, *flag(chance, name, value)), names)
    return Mistake(("train", *more, "--config", "my.yaml"), (*names, "my.yaml"), {"my.yaml": overlay(name, value)})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)
BAD_FILES: dict[str, bytes] = {
    "empty": b"",
    "comment only": b"# nothing\n",
    "zeros": b"\0" * 1000,
    "binary": bytes(range(256)) * 4,
    "UTF-16": "sac: {steps: 4}".encode("utf-16"),
    "UTF-32": "sac: {steps: 4}".encode("utf-32"),
    "Latin-1": "run_dir: Läufe".encode("latin-1"),
    "JSON list": b"[1, 2]",
    "scalar": b"3",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "open bracket": b"sac: [1, 2",
    "tab": b"sac:\n\tsteps: 4\n",
    "alias bomb": BOMB.encode(),
    "merged bomb": (BOMB + "sac: {<<: *c}\n").encode(),
    "endless alias": b"sac: &s {steps: *s}\n",
    "missing anchor": b"seed: *other\n",
    "deep lists": b"seed: " + b"[" * 20_000,
    "deep mappings": b"{a: " * 20_000,
    "deep but closed": b"sac: " + b"{a: " * 5_000 + b"1" + b"}" * 5_000,
    "Python object": b"seed: !!python/object/apply:os.system ['touch owned']\n",
    "custom tag": b"seed: !include /etc/passwd\n",
    "key twice": b"seed: 1\nseed: 2\n",
    "section twice": b"sac: {steps: 1}\nsac: {warmup: 1}\n",
    "key twice in a section": b"sac: {steps: 1, steps: 2}\n",
    "list as key": b"? [1, 2]\n: 3\n",
    "null as key": b"null: 3\n",
    "number as key": b"sac: {1: 2}\n",
    "escapes in a key": b'"\\e[31mseed\\n\\n\\n": 3\n',
    "raw escapes": b"seed: \x1b[31m3\n",
    "option as a value": b'benchmark: {tasks: [reach-v3, "--seed", "3"]}\n',
    "option as a key": b'"seed --threads": 3\n',
    "equals in a key": b'"seed=3": 4\n',
    "empty key": b'"": 3\n',
    "too large": b"# " + b"x" * 3_000_000 + b"\nseed: 1\n",
    "date": b"seed: 2001-01-01\n",
    "sexagesimal overflow": b"sac: {steps: " + b":".join([b"59"] * 300) + b"}\n",
    "huge digits": b"seed: " + b"9" * 100_000 + b"\n",
    "NUL in a path": b'run_dir: "a\\0b"\nbenchmark: {tasks: [reach-v3]}\nenvs: {workers: 0}\n',
}

NO_FILES = ("", ".", "/", "missing.yaml", "/dev/null/x", "/dev/null", "/proc", "a/../b", "~", "x" * 5_000, "é" * 300,
            "a\x1b[31mb", "quick start", "\uff51uickstart", "quickstart\n", "/dev/zero", "-", "-x", "file:///etc/passwd",
            "\udcff\udcfe", "*.yaml", "my.yaml/..", "my.yaml/x", "../" * 2_000)  # fmt: skip
