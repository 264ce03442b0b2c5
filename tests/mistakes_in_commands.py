"""Mistakes in command lines, and in the run folders that they name, each function with the reason why it is one."""

from __future__ import annotations

import random
from collections.abc import Callable

import yaml
from mistakes import BAD_FILES, BOOLS, CHOICES, FLOATS, INTEGERS, LONG, NO_FILES, TERMINAL, Mistake, Spoil, flag


def broken_grammar(chance: random.Random) -> Mistake:
    """An option without its value, a value without its option, one value too many, an option that does not exist."""
    words = chance.choice([
        ("train", "--sac.steps"), ("train", "--sac.steps", "3", "4"), ("train", "stray"), ("train", ""),
        ("train", "--"),
        ("train", "--", "--seed", "3"), ("train", "-seed", "3"), ("train", "---seed", "3"), ("train", "--=3"),
        ("train", "--seed="), ("train", "=3"), ("train", "--config"), ("train", "--config="), ("train", "--resume"),
        ("train", "--resume="), ("train", "--aggregator"), ("train", "--benchmark", "a", "b"), ("train", "-x"),
        ("train", "--wandb", "maybe"), ("train", "--wandb=maybe"), ("train", "--benchmark.tasks"),
        ("train", "\x1b[31m"),
        ("train", "--\x1b[31m"), ("train", "--seed", "-"), ("train", "-" * 5_000), ("train", "é" * 9_000),
        ("evaluate",), ("evaluate", "--"), ("evaluate", "--device"), ("evaluate", "a", "b"), ("evaluate", "--run", "a"),
        ("evaluate", "x", "--device", "tpu"), ("evaluate", "x", "--device="), ("evaluate", "-1"), ("evaluate", ""),
        ("list",), ("list", ""), ("list", "task"), ("list", "tasks", "configs"), ("list", "--all"),
        ("list", "\x1b[31m"),
        ("report", "--out"), ("report", "--outt", "x"), ("report", "--out=a", "b", "--c"),
        ("record",), ("record", "x", "--fps"), ("record", "x", "--nosuch=1"), ("record", "--", "x", "y"),
        ("bench",), ("bench", "nothing"), ("bench", "envs", "solvers"), ("bench", "envs", "--steps"), ("bench", "--"),
        ("bench", "solvers", "--steps", "5"), ("bench", "update", "--tasks", "5"), ("bench", ""),
        ("compare", "--seeds"), ("compare", "--aggregators"), ("compare", "stray"), ("compare", "--"), ("compare", ""),
        ("compare", "--dry-run", "maybe"), ("compare", "--nosuch", "3"), ("compare", "--resume", "x"),
    ])  # fmt: skip
    given = [word.lstrip("-").partition("=")[0][:20].replace("\x1b", "\\x1b") for word in words[1:]]
    if words in (("evaluate", ""), ("list", "--all")):  # of what is missing there, the name
        given = ["run: ", "'what'"]
    return Mistake(words, (*filter(None, given), "PATH", "--: ", "''", "{", "no such field"))


def unknown_command(chance: random.Random) -> Mistake:
    """The first word is no command."""
    wrong = (
        "trian",
        "",
        " ",
        "--seed",
        "TRAIN",
        "train ",
        "t\u0433ain",
        "-",
        "--",
        "\udcff",
        "../train",
        *TERMINAL,
        *LONG,
    )
    return Mistake((chance.choice(wrong), "--seed", "3"), ("no command",))


def no_run(chance: random.Random) -> Mistake:
    """A folder that holds no run, or none at all, for every command that reads one."""
    place = chance.choice([*(name for name in NO_FILES if not name.startswith("-")), "my.yaml", "empty.yaml/x", "/etc"])
    command = chance.choice([("evaluate",), ("record",), ("report",), ("train", "--resume")])
    if command[0] == "report" and place in ("/", "a/../b", "my.yaml/..", "../" * 2_000):  # runs may well be below
        place = "missing"
    words = ("train", f"--resume={place}") if command[0] == "train" else (*command, place)
    return Mistake(words, ("run", "config.yaml", "resume"), {"my.yaml": b"seed: 1"})


def stored(name: str, value: object) -> Spoil:
    """Sets a field of a stored configuration."""

    def edit(content: bytes) -> bytes:
        config = yaml.safe_load(content)
        *sections, last = name.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[last] = value
        return yaml.safe_dump(config).encode()

    return edit


def reads_run(chance: random.Random) -> tuple[str, ...]:
    """A command that loads the spoilt run."""
    return chance.choice(
        [("evaluate", "spoilt"), ("record", "spoilt"), ("report", "spoilt"), ("train", "--resume", "spoilt")]
    )


def spoilt_field(chance: random.Random) -> Mistake:
    """A run folder whose config.yaml has a value of another type, an unknown field, or one out of range."""
    if chance.random() < 0.5:
        name = chance.choice(INTEGERS + FLOATS)
        value = chance.choice(["text", [1], {"a": 1}, float("nan"), 10**400, -(10**400), [[]], "\x1b[31m"])
    elif chance.random() < 0.5:
        name = chance.choice(CHOICES + BOOLS)
        value = chance.choice(["text", 3, None, [True], {}, "\x1b[31m", "x" * 50_000])
    else:
        name, value = chance.choice([
            ("aggregator", 3), ("aggregator", None), ("aggregator", []), ("aggregator", {}), ("sac", 3), ("envs", None),
            ("sac", []), ("sac", "x"), ("aggregator.name", 3), ("aggregator.name", None), ("aggregator.name", "imgard"),
            ("aggregator.name", "os:system"), ("aggregator.name", []), ("aggregator.nosuch", 1), ("sac.nosuch", 1),
            ("nosuch", 1), ("\x1b[31m", 1), ("benchmark.tasks", 3), ("benchmark.tasks", []), ("benchmark.tasks", [3]),
            ("benchmark.tasks", {}), ("sb3.net_arch", [2.5]), ("sb3.ent_coef", None), ("run_dir", 3), ("run_dir", []),
        ])  # fmt: skip
    words = reads_run(chance)
    if name == "aggregator.name" and words[0] == "report":  # a report takes any rule's name, and imports nothing
        words = ("evaluate", "spoilt")
    return Mistake(words, (name.rpartition(".")[2], "config.yaml"), spoilt={"config.yaml": stored(name, value)})


def spoilt_text(chance: random.Random) -> Mistake:
    """A run folder whose config.yaml is damaged as a whole."""
    content = BAD_FILES[chance.choice([name for name in BAD_FILES if name not in ("comment only", "NUL in a path")])]
    words = reads_run(chance)
    if b"--seed" in content and words[0] == "report":  # a report takes any task's name
        words = ("evaluate", "spoilt")
    return Mistake(words, ("spoilt", "benchmark.tasks"), spoilt={"config.yaml": lambda _: content})


def spoilt_goals(chance: random.Random) -> Mistake:
    """A run folder without its goals.json, or with one that is none."""
    content = chance.choice([None, b"", b"[]", b"3", b"null", b"{", b"{}", b"\x80\xff", b"[" * 50_000, b'{"goals": 3}',
                             b'{"goal_seed": 1, "goals": {"reach-v3": "x"}}', b'{"goal_seed": 1, "goals": {}}',
                             b'{"goal_seed": 1, "goals": {"reach-v3": [[NaN, 0, 0, 0, 0, 0]]}}',
                             b'{"goal_seed": 1, "goals": {"\\u001b[31m": [[0, 0, 0]]}}'])  # fmt: skip
    command = chance.choice(
        [("evaluate", "spoilt"), ("record", "spoilt"), ("train", "--resume", "spoilt", "--sac.steps", "8")]
    )
    return Mistake(command, ("goals",), spoilt={"goals.json": lambda _: content})


def wrong_change(chance: random.Random) -> Mistake:
    """A resumed run cannot become another one."""
    words, name = chance.choice([("--seed 9", "seed"), ("--sac.gamma 0.5", "sac.gamma"),
        ("--aggregator pcgrad", "aggregator"),
                                 ("--benchmark push-v3", "benchmark.tasks"), ("--network.width 9", "network.width"),
                                 ("--algorithm sb3-sac", "algorithm"), ("--envs.horizon 3", "envs.horizon"),
                                 ("--sac.stepz 3", "sac.stepz"), ("--sac.steps nan", "sac.steps")])  # fmt: skip
    return Mistake(("train", "--resume", "spoilt", *words.split()), (name,))


COMPARISONS = {
    "aggregators": ("", ",", "cagrad,", "cagrad,c", "cagrad,=1", "cagrad,c=", "cagrad,c=nan", "cagrad,x=1", "nosuch",
        "sb3-sac,x=1",
                    "mean,c=1", "sb3-sac,gamma=2", "cagrad,c=-1", "a/b:C", "\x1b[31m", "sb3,c=1", "torchjd:Nothing",
                    *LONG),
    "seeds": ("0", "-1", "nan", "x", "", "1.5", str(10**400), str(10**12), "4294967296"),
    "first_seed": ("-1", "4294967296", "x", str(10**400), "4294967293"),
    "jobs": ("0", "-3", "x", str(10**400), str(10**12)),
    "cpus": ("0", "-3", "x", str(10**400)),
    "gpus": ("-1", "nan", "inf", "x", "1e999"),
    "launcher": ("slurm", "", "LOCAL", "\x1b[31m"),
    "address": ("10.0.0.1:6379", "\x1b[31m"),
    "out": ("my.yaml", "my.yaml/x", "/dev/null", "/dev/null/x", "/proc/x", "n" * 300),
    "sac.steps": ("0", "x", "nan", "-5"),
    "sac.stepz": ("3",),
    "seed": ("3",),
    "run_dir": ("x",),
    "config": ("nosuch", "my.yaml", "/dev/null"),
    "benchmark": ("MT11", "", "\x1b[31m"),
}  # fmt: skip


def wrong_comparison(chance: random.Random) -> Mistake:
    """An option of `compare`, or of the runs that it starts, that is not allowed."""
    name = chance.choice(list(COMPARISONS))
    words = ("compare", *chance.choice([(), ("--dry-run",)]), *flag(chance, name, chance.choice(COMPARISONS[name])))
    names = (name.rstrip("s"), name.replace("_", "-"), "seed", "tasks")
    return Mistake(words, names, {"my.yaml": b"- 1"})


def wrong_report(chance: random.Random) -> Mistake:
    """A place for the report at which there is something else or that cannot be made."""
    place = chance.choice(
        ["my.yaml", "my.yaml/x", "/dev/null", "/dev/null/x", "/proc/x", "n" * 300, ".", "/", "spoilt", "", "/sys/x"]
    )
    return Mistake(("report", "spoilt", f"--out={place}"), ("out",), {"my.yaml": b"seed: 1"})


RECORDINGS = {
    "task": ("push-v3", "", "reach", "\x1b[31m", *LONG),
    "episodes": ("0", "-1", "51", "x", "nan", str(10**400)),
    "goals": ("-1", "50", "x", "1.5", str(10**400)),
    "out": ("my.yaml", "my.yaml/x", "/dev/null/x", "/proc/x", "n" * 300),
    "format": ("avi", "", "MP4", "\x1b[31m"),
    "camera": ("corner9", "", "\x1b[31m", *LONG),
    "size": ("0x0", "480", "481x480", "-2x-2", "x", "", "1e3x1e3", "9" * 5_000 + "x480", "\uff14\uff18\uff10x480",
        "99999999x2", "480x480\n"),
    "fps": ("0", "-1", "241", "nan", "x", str(10**400)),
    "speed": ("0", "-1", "nan", "inf", "1e999", "101", "x"),
    "device": ("tpu", "", "CPU"),
}  # fmt: skip


def wrong_recording(chance: random.Random) -> Mistake:
    """An option of `record` that is not allowed."""
    name = chance.choice(list(RECORDINGS))
    words = ("record", "spoilt", f"--{name}={chance.choice(RECORDINGS[name])}")
    return Mistake(words, (name,), {"my.yaml": b"seed: 1"})


BENCHES = {
    "envs": {"benchmark": ("mt11", "MT10", ""), "steps": ("0", "-1", "501", "nan", "x", str(10**400),
        str(500 * 10**12)),
             "repeats": ("0", "-1", "x", str(10**400), str(10**12)), "options": ("nosuch", "", "\x1b[31m", *LONG)},
    "solvers": {"tasks": ("1", "0", "-3", "x", "2.5", str(10**400), str(10**9)), "repeats": ("0", "x", str(10**400))},
    "update": {"aggregator": ("nosuch", "", "\x1b[31m", *LONG), "mode": ("fast", ""), "repeats": ("0", "x",
        str(10**400)),
               "batch_per_task": ("0", "-1", "x", str(10**400), str(10**12)), "threads": ("-1", "x", str(10**400),
                   str(10**12)),
               "options": ("nosuch", "\x1b[31m"), "memory": ("maybe", ""), "benchmark": ("mt11", "10")},
}  # fmt: skip
BENCH_FILES = ("missing/x.json", "my.yaml/x.json", "/dev/null/x", ".", "/proc/x", "", "n" * 300)


def wrong_bench(chance: random.Random) -> Mistake:
    """An option of `bench` that is not allowed."""
    what = chance.choice(list(BENCHES))
    options = BENCHES[what] | {"json": BENCH_FILES}
    name = chance.choice(list(options))
    words = ("bench", what, f"--{name}={chance.choice(options[name])}")
    return Mistake(words, (name, name.replace("_", "-")), {"my.yaml": b"seed: 1"})


IN_COMMANDS: tuple[Callable[[random.Random], Mistake], ...] = (
    broken_grammar, unknown_command, no_run, spoilt_field, spoilt_text, spoilt_goals, wrong_change, wrong_comparison,
    wrong_report, wrong_recording, wrong_bench,
)  # fmt: skip
