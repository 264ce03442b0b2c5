"""Mistakes in the configuration of `mtrl-imgrad train`, each function with the reason why it is one."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import get_args

from mistakes import (
    BAD_FILES,
    BOOLS,
    CHOICES,
    FIELDS,
    FLOATS,
    HUGE,
    INTEGERS,
    LONG,
    NO_FILES,
    SIGNED,
    TERMINAL,
    WORDS,
    Mistake,
    overlay,
    set_field,
)

from mtrl_imgrad.aggregators import AGGREGATORS


def not_a_number(chance: random.Random) -> Mistake:
    """Text where a number is needed."""
    return set_field(chance, chance.choice(INTEGERS + FLOATS), chance.choice(WORDS))


def broken_integer(chance: random.Random) -> Mistake:
    """No whole number where one is needed."""
    return set_field(chance, chance.choice(INTEGERS), chance.choice(["1.5", "1e3", "nan", "inf", "-0.0", "True"]))


def negative(chance: random.Random) -> Mistake:
    """Below zero, where no field but those of SIGNED may be."""
    name = chance.choice([name for name in INTEGERS + FLOATS if name not in SIGNED])
    return set_field(chance, name, "-" + chance.choice(["1", "7", "1000000"]))


def not_finite(chance: random.Random) -> Mistake:
    """NaN or an infinity, which no field takes."""
    return set_field(chance, chance.choice(FLOATS), chance.choice(["nan", "inf", "-inf", "1e999", "-1e999", "NaN"]))


def huge_integer(chance: random.Random) -> Mistake:
    """A whole number that 64 bits do not hold."""
    return set_field(chance, chance.choice(INTEGERS), chance.choice(HUGE))


def unaffordable(chance: random.Random) -> Mistake:
    """So many threads, processes, environments, units or transitions that no machine has them."""
    name = chance.choice(["threads", "envs.workers", "envs.envs_per_task", "network.width", "network.depth",
                          "sac.batch_per_task", "sac.critic_bins", "sac.n_step", "sac.updates_per_step",
                          "replay.capacity"])  # fmt: skip
    made = set_field(chance, name, chance.choice([str(10**12), str(2**62), str(2**40)]))
    fits = ("--replay.capacity=9000000000000000000",) if name in ("envs.envs_per_task", "sac.n_step") else ()
    small = ("--benchmark", "reach-v3", "--envs.workers", "0") if name == "replay.capacity" else ()
    return dataclasses.replace(made, arguments=(*made.arguments, *fits, *small))


def unknown_choice(chance: random.Random) -> Mistake:
    """A word that is none of a field's choices: another one, a look-alike (Cyrillic, fullwidth), other case, empty."""
    name = chance.choice(CHOICES)
    choice = str(chance.choice(get_args(FIELDS[name])))
    wrong = (
        choice.upper() + "X",
        choice.replace("a", "\u0430").replace("o", "\u043e") + "\uff58",
        choice + " ",
        "",
        *TERMINAL,
        *LONG,
    )
    return set_field(chance, name, chance.choice(wrong))


def unknown_truth(chance: random.Random) -> Mistake:
    """Neither true nor false."""
    return set_field(chance, chance.choice(BOOLS), chance.choice(["maybe", "2", "", "Trüe", "nan", *TERMINAL, *LONG]))


def unknown_field(chance: random.Random) -> Mistake:
    """A name that no field has: a letter too many, an odd character, a section as a field, a very long one."""
    name = chance.choice(list(FIELDS))
    at = chance.randrange(len(name) + 1)
    odd = chance.choice(["z", "é", "\x1b[7m", "..", "\u0430", "q" * 50_000])
    wrong = name[:at] + odd + name[at:]
    shown = (name.split(".")[-1][:2], wrong[:3].replace("\x1b", "\\x1b"), "no such field", "my.yaml")
    if chance.random() < 0.5:
        return Mistake(("train", f"--{wrong}=1"), shown)
    return Mistake(("train", "--config", "my.yaml"), shown, {"my.yaml": overlay(wrong, 1)})


def wrong_structure(chance: random.Random) -> Mistake:
    """A list or a mapping where one number is needed, or a scalar or a list where a section is."""
    if chance.random() < 0.5:
        name = chance.choice(INTEGERS + FLOATS)
        value = chance.choice([[1, 2], {"a": 1}, [[1]], [], {}, {"a": {"b": [1]}}, None, True])
        if value is None and name in ("envs.workers", "envs.goal_seed"):
            value = []
    else:
        name = chance.choice(["envs", "sac", "network", "log", "replay", "aggregator", "eval", "checkpoint"])
        value = chance.choice([3, "text", [1, 2], [], None, True, 1.5, [{"steps": 3}]])
    return Mistake(("train", "--config", "my.yaml"), (name, name.replace("_", "-")), {"my.yaml": overlay(name, value)})


def bad_file(chance: random.Random) -> Mistake:
    """A file that is no YAML mapping of fields in UTF-8, or an ambiguous or a malicious one."""
    content = BAD_FILES[chance.choice(list(BAD_FILES))]
    names = ("my.yaml", "seed", "sac", "tasks", "run_dir", "no such field")
    return Mistake(("train", "--config", "my.yaml"), names, {"my.yaml": content})


def no_overlay(chance: random.Random) -> Mistake:
    """A path at which there is no file and that is no shipped configuration's name."""
    return Mistake(("train", f"--config={chance.choice(NO_FILES)}"), ("config",), {"my.yaml": b"seed: 1"})


def unusable_run_dir(chance: random.Random) -> Mistake:
    """A folder that cannot be made: below a file or a device, too long, with a NUL, in /proc, or already filled."""
    place = chance.choice(["my.yaml", "my.yaml/run", "/dev/null", "/dev/null/x", "/proc/run", "/proc/1/x", "n" * 300,
                           "a/" * 3_000, "my.yaml/../x", ".", "/etc", "/", "/sys/x"])  # fmt: skip
    small = ("--benchmark", "reach-v3", "--envs.workers", "0", "--replay.capacity", "50", "--network.width", "4")
    return Mistake(("train", *small, f"--run-dir={place}"), ("run_dir",), {"my.yaml": b"seed: 1"})


def unknown_task(chance: random.Random) -> Mistake:
    """A task that Meta-World has not, or one twice."""
    wrong = (
        "reach-v2",
        "MT11",
        "",
        " ",
        "reach-v3 ",
        "r\u0435ach-v3",
        "reach\u2011v3",
        "None",
        "../reach-v3",
        *TERMINAL,
        *LONG,
    )
    if chance.random() < 0.3:
        twice = chance.choice([["reach-v3", "reach-v3"], ["MT10", "reach-v3"], ["mt10", "MT10"], ["MT50", "push-v3"]])
        return Mistake(("train", "--benchmark.tasks", *twice), ("tasks",))
    name = chance.choice(wrong)
    how = chance.choice([("--benchmark", name), (f"--benchmark={name}",), ("--benchmark.tasks", "push-v3", name)])
    return Mistake(("train", *how), ("tasks", "benchmark"))


RULES = ("imgard", "", " ", "IMGrad", "mean ", "тean", ":", "a:", ":b", "a:b:c", "torchjd:", "torchjd:None",
    "os:system",
         "..:x", "json:JSONDecoder", "my.rules:Rule", "no/such:Rule", "torchjd:GeneralizedMean\x1b[1m", "mtrl_imgrad:x",
         "sys:\x1b[0m", "mtrl_imgrad.aggregators:Aggregator", ".:a", "a..b:C", "a b:C", *TERMINAL, *LONG)  # fmt: skip


def unknown_aggregator(chance: random.Random) -> Mistake:
    """A rule that is not on the shelf, no module's, or no rule."""
    name = chance.choice(RULES)
    if chance.random() < 0.5:
        return Mistake(("train", f"--aggregator={name}"), ("aggregator",))
    return Mistake(("train", "--config", "my.yaml"), ("aggregator",), {"my.yaml": overlay("aggregator.name", name)})


def wrong_rule_field(chance: random.Random) -> Mistake:
    """A field of a rule that is no number, not finite, negative beyond its range, or not the rule's at all."""
    rule = chance.choice([name for name, cls in AGGREGATORS.items() if dataclasses.fields(cls)])  # pyright: ignore
    own = {f.name: f.type for f in dataclasses.fields(AGGREGATORS[rule])}  # pyright: ignore
    numbers = [name for name, hint in own.items() if hint in ("int", "float")]
    if not numbers or chance.random() < 0.3:
        wrong = chance.choice(["nosuch", "c2", "x" * 1000, "é"])
        return Mistake(("train", "--aggregator", rule, f"--aggregator.{wrong}=1"), (wrong[:5],))
    name = chance.choice(numbers)
    value = chance.choice(
        ["nan", "inf", "1e999", "-inf", "-1e300" if own[name] == "float" else "-1", *WORDS[:4], *HUGE[2:3]]
    )
    return Mistake(("train", "--aggregator", rule, f"--aggregator.{name}={value}"), (name, name.replace("_", "-")))


CONTRADICTIONS = (
    ("--network.share-encoder True --network.depth 1", "network.depth"),
    ("--log.wandb True --log.tensorboard False", "log.wandb"),
    ("--wandb --log.tensorboard False", "log.wandb"),
    ("--device cpu --cuda-graph True", "cuda_graph"),
    ("--compile False --cuda-graph True", "cuda_graph"),
    ("--jacobian chunked --aggregator pcgrad --aggregator graddrop", "jacobian"),
    ("--envs.horizon 10 --envs.action-repeat 11", "envs.action_repeat"),
    ("--replay.capacity 8 --sac.n-step 8", "replay.capacity"),
    ("--network.log-std-min 1 --network.log-std-max 1", "network.log_std"),
    ("--sac.critic-min 5 --sac.critic-max -5", "sac.critic_min"),
    ("--algorithm sb3-sac --aggregator imgrad", "aggregator"),
    ("--algorithm sb3-sac --sac.gamma 0.9", "sac.gamma"),
    ("--algorithm sb3-sac-single --replay.capacity 100", "replay"),
    ("--sb3.batch-size 4", "sb3.batch_size"),
    ("--algorithm sb3-sac --sb3.net-arch 0", "sb3.net_arch"),
    ("--algorithm sb3-sac --sb3.net-arch -3", "sb3.net_arch"),
    ("--algorithm sb3-sac --sb3.ent-coef inf", "sb3.ent_coef"),
    ("--algorithm sb3-sac --sb3.target-entropy auto_1", "sb3.target_entropy"),
    ("--algorithm sb3-sac --sb3.gradient-steps 0", "sb3.gradient_steps"),
    ("--algorithm sb3-sac --sb3.learning-rate 1e999", "sb3.learning_rate"),
    ("--algorithm sb3-sac --sb3.net-arch 1000000000", "sb3.net_arch"),
)


def contradiction(chance: random.Random) -> Mistake:
    """Fields that are allowed one by one and not together, or that the algorithm does not read."""
    flags, name = chance.choice(CONTRADICTIONS)
    return Mistake(("train", *flags.split(), "--seed", str(chance.randrange(100))), (name, name.replace("_", "-")))


IN_CONFIGS: tuple[Callable[[random.Random], Mistake], ...] = (
    not_a_number, broken_integer, negative, not_finite, huge_integer, unaffordable, unknown_choice, unknown_truth,
    unknown_field, wrong_structure, bad_file, no_overlay, unusable_run_dir, unknown_task, unknown_aggregator,
    wrong_rule_field, contradiction,
)  # fmt: skip
