"""Mistakes in what a run folder has beside its configuration: checkpoints and tables, each with the reason why it is
one. Those of `foreign_*` are whole by their manifest; only what they hold is none of this run's."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from mistakes import LONG, TERMINAL, Mistake, Spoil
from safetensors.torch import load, save

from mtrl_imgrad.checkpoint import FORMAT

CHECKPOINT = "checkpoints/0000000004"
"""That of the trained runs, which have one."""
MISSING = object()
RESUME, USE = ("train", "--resume", "spoilt"), (("evaluate", "spoilt"), ("record", "spoilt"))
NO_JSON = (b"", b"\0" * 50, b"{", b"[]", b"3", b"null", b'"x"', b"\x80\xff", b"[" * 50_000, b'{"a":' * 50_000,
           b"9" * 5_000, pickle.dumps({"tasks": ["reach-v3"]}), b"NaN")  # fmt: skip
NO_NUMBERS = (MISSING, None, True, "4", "x" * 5_000, "\x1b[31m", [], {}, 4.0, float("nan"), -1, 10**300)


def unknown_checkpoint(chance: random.Random) -> Mistake:
    """A name of a checkpoint that the run does not have: it has step 4, and no best one."""
    wrong = ("best", "BEST", "newest ", "Newest", "", " ", "0", "5", "40", "-4", "+4", "4.0", "4e0", "0x4", "\uff14",
             "²", "nan", str(10**400), "9" * 5_000, "4.old", "0000000004.tmp", ".", "..", "/", "../checkpoints", "a/b",
             "/dev/null", "*", "None", "x" * 300, *TERMINAL, *LONG)  # fmt: skip
    return Mistake((*chance.choice(USE), f"--checkpoint={chance.choice(wrong)}"), ("checkpoint: ",))


def edited(content: bytes, path: tuple[Any, ...], value: object) -> bytes:
    """JSON with another value at a path, or without it."""
    document = json.loads(content)
    *above, last = path
    place = document
    for key in above:
        place = place[key]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document).encode()


def damaged_manifest(chance: random.Random) -> Mistake:
    """A manifest that is gone, is none, is another checkpoint's, names other files or vouches for other contents."""
    wrong: dict[tuple[str, ...], tuple[object, ...]] = {
        ("format",): (1, FORMAT - 1, FORMAT + 1, -1, 10**300, True),
        ("step",): (*NO_NUMBERS, 3, 5),
        ("kept",): (MISSING,),
        ("resumable",): (MISSING, False),
        ("files",): (MISSING, None, [], 3, {}, {"state.json": {}}, {"../../x.json": {"size": 1, "sha256": ""}}),
        ("files", "state.json"): (MISSING, None, 3, {}, {"size": 1}, {"size": 1, "sha256": 3}),
        ("files", "state.json", "size"): (MISSING, None, "x", -1, 10**300, float("nan"), float("inf"), {}),
        ("files", "learner.safetensors", "sha256"): (MISSING, None, "", 3, {}, "0" * 64),
        ("files", "/etc/passwd"): ({"size": 1, "sha256": ""},),
        ("files", "../config.yaml"): ({"size": 1, "sha256": ""},),
        ("files", "absent.json"): ({"size": 1, "sha256": ""},),
    }
    path = chance.choice(list(wrong))
    value = chance.choice(wrong[path])
    spoil: Spoil = lambda content: edited(content, path, value)  # noqa: E731
    if chance.random() < 0.2:
        content = chance.choice((None, *NO_JSON))
        spoil = lambda _: content  # noqa: E731
    commands = (RESUME,) if path == ("resumable",) else (RESUME, *USE)
    return Mistake(chance.choice(commands), ("0000000004", "checkpoint.replay"),
                   spoilt={f"{CHECKPOINT}/manifest.json": spoil}, baseline=chance.random() < 0.3)  # fmt: skip


def damaged_part(chance: random.Random) -> Mistake:
    """A file of a checkpoint that is gone, cut off, longer, or has one bit changed."""
    name = chance.choice(["state.json", "learner.safetensors", "generators.safetensors", "replay-*.safetensors"])
    at = chance.random()

    def flipped(content: bytes) -> bytes:
        place = int(at * len(content))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    spoil = chance.choice(
        [lambda _: None, lambda _: b"", lambda x: x[: int(at * len(x))], lambda x: x + b"\0", flipped]
    )
    commands = (RESUME,) if name.startswith("replay") else (RESUME, *USE)
    return Mistake(chance.choice(commands), (f"is damaged ({name[:6]}",), spoilt={f"{CHECKPOINT}/{name}": spoil},
                   baseline=chance.random() < 0.3)  # fmt: skip


STREAM = {"bit_generator": "PCG64", "state": {"state": 1, "inc": 1}, "has_uint32": 0, "uinteger": 0}
NO_STREAMS = (MISSING, None, 3, [], {}, STREAM | {"bit_generator": "MT19937"}, STREAM | {"state": {}},
              STREAM | {"state": {"state": -1, "inc": 1}}, STREAM | {"uinteger": 10**300},
              STREAM | {"state": {"state": "x", "inc": 1}}, STREAM | {"has_uint32": None})  # fmt: skip
NO_OBJECTS = (MISSING, None, [], 3, "x", {})
POLICY = {
    ("tasks",): (MISSING, None, 3, "reach-v3", [], ["push-v3"], [3], ["reach-v3"] * 2, ["\x1b[31m"], [[]], {}),
    ("observation_size",): (*NO_NUMBERS, 0, 38, 2**40, 2**53),
    ("action_size",): (*(x for x in NO_NUMBERS if x != 4), 0, 3, 2**40),
}  # fmt: skip
ENVS: dict[tuple[Any, ...], tuple[object, ...]] = {
    (): NO_OBJECTS,
    ("tasks",): (MISSING, None, [], ["push-v3"], "reach-v3", {}, ["reach-v3"] * 2),
    ("envs_per_task",): (*NO_NUMBERS, 0, 2),
    ("start",): NO_OBJECTS,
    ("start", "goal"): (MISSING, None, [], [0, 0], [50], [-1], ["0"], [0.5], [True], [[0]], 0, [10**300]),
    ("start", "schedule"): NO_OBJECTS,
    ("start", "schedule", "generators"): (MISSING, None, [], {}, [STREAM] * 2),
    ("start", "schedule", "generators", 0): NO_STREAMS[1:],
    ("start", "schedule", "queues"): (MISSING, None, [], {}, [3], [[50]], [[-1]], [["x"]], [[0.0]], [[]] * 2),
    ("actions",): (MISSING, None, "ab", {}, [3], [None], ["zz"], ["00"], ["0000c07f" * 4], ["00" * 12],
                   ["00" * 16] * 3, ["\x1b[31m"]),
    ("restarts",): (MISSING, None, {}, 3, [3], [[0]], [[9, [0]]], [[-1, [0]]], [["0", [0]]], [[0, [1]]], [[0, [-1]]],
                    [[0, [0.0]]], [[0, 0]], [[0, [0], 1]]),
}  # fmt: skip
MTSAC = {
    ("written",): (*NO_NUMBERS, 0, 3, 5),
    ("held_back",): (*NO_NUMBERS, 1),
    ("left_out",): NO_NUMBERS,
} | {("envs", *path): values for path, values in ENVS.items()}
BASELINE = {
    ("models",): (*NO_OBJECTS, [3], [{}]),
    ("left_out",): NO_NUMBERS,
    ("models", 0, "held_back"): (*NO_NUMBERS, 1),
    ("models", 0, "timesteps"): (*NO_NUMBERS, 0, 3, 5),
    ("models", 0, "updates"): NO_NUMBERS,
    ("models", 0, "position"): (*NO_NUMBERS, 3, 5),
    ("models", 0, "full"): (MISSING, None, 0, 1, True, "x", []),
    ("models", 0, "action_space"): NO_STREAMS,
    ("models", 0, "losses"): (*NO_OBJECTS, {"count": 0}, {"count": -1, "sums": {}}, {"count": 1, "sums": {"x": 1.0}},
                              {"count": 1, "sums": {"train/critic_loss": "x"}}),
} | {("models", 0, "envs", *path): values for path, values in ENVS.items()}  # fmt: skip


def foreign_state(chance: random.Random) -> Mistake:
    """A state.json that lacks an entry, or has one of another type, of another run or another moment, or is none."""
    baseline = chance.random() < 0.4
    states: dict[Any, Any] = POLICY if chance.random() < 0.3 else BASELINE if baseline else MTSAC
    path = chance.choice(list(states))
    value = chance.choice(states[path])
    command = chance.choice((RESUME, *USE)) if states is POLICY else RESUME
    spoil: Spoil = lambda content: edited(content, path, value)  # noqa: E731
    if chance.random() < 0.1:
        content, command = chance.choice(NO_JSON), chance.choice((RESUME, *USE))
        spoil = lambda _: content  # noqa: E731
    return Mistake(command, ("0000000004", "tasks of its checkpoint"), spoilt={f"{CHECKPOINT}/state.json": spoil},
                   baseline=baseline, sealed=True)  # fmt: skip


def changed_tensors(chance: random.Random) -> Spoil:
    """One tensor of a file is gone, renamed, of another shape or of another type, or there is one more."""
    which, how = (
        chance.random(),
        chance.choice(["gone", "renamed", "more", "longer", "row", "scalar", "type", "nested"]),
    )

    def spoil(content: bytes) -> bytes:
        tensors = load(content)
        name = sorted(tensors)[int(which * len(tensors))]
        old = tensors.pop(name)
        other = torch.float16 if old.dtype.is_floating_point else torch.float32
        tensors |= {
            "gone": {},
            "renamed": {f"{name}x": old},
            "more": {name: old, "\x1b[31m": torch.zeros(3)},
            "longer": {name: torch.cat([old.flatten(), old.flatten()[:1], old.new_zeros(1)])},
            "row": {name: old[None]},
            "scalar": {name: old.new_zeros((0,) * (old.ndim + 1))},
            "type": {name: old.to(other)},
            "nested": {f"9.{name}": old},
        }[how]
        return save(tensors)

    return spoil


NO_TENSORS = (b"", b"\0" * 8, b"{}", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"{]",
              struct.pack("<Q", 2) + b"{}" + b"x" * 50, pickle.dumps([1]), b"\xff" * 1000,
              struct.pack("<Q", 71) + b'{"actor":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4]}}   ',
              )  # fmt: skip


def foreign_tensors(chance: random.Random) -> Mistake:
    """A file of tensors with other names, shapes or types than this run's, or with none at all."""
    baseline = chance.random() < 0.4
    name = chance.choice(["learner", "generators", "rewards", "episodes", "replay-*", "learner",
                          *([] if baseline else ["averages", "cosines"])])  # fmt: skip
    spoil = changed_tensors(chance)
    if chance.random() < 0.2:
        content = chance.choice(NO_TENSORS)
        spoil = lambda _: content  # noqa: E731
    if baseline and name == "learner":  # evaluation reads the policies and leaves the optimisers
        command = RESUME
    else:
        command = chance.choice((RESUME, *USE)) if name == "learner" else RESUME
    return Mistake(command, ("0000000004",), spoilt={f"{CHECKPOINT}/{name}.safetensors": spoil},
                   baseline=baseline, sealed=True)  # fmt: skip


def missing_part(chance: random.Random) -> Mistake:
    """A checkpoint whose manifest does not name a file that every checkpoint has."""
    name = chance.choice(["learner", "generators", "rewards", "episodes", "replay-*", "averages", "cosines"])
    command = chance.choice((RESUME, *USE)) if name == "learner" else RESUME
    baseline = name not in ("averages", "cosines") and chance.random() < 0.4
    return Mistake(command, ("0000000004",), spoilt={f"{CHECKPOINT}/{name}.safetensors": lambda _: None},
                   baseline=baseline, sealed=True)  # fmt: skip


def foreign_generators(chance: random.Random) -> Mistake:
    """Random streams of the right shape with numbers that are no state of them."""
    byte = chance.choice([0, 255, 7])

    def spoil(content: bytes) -> bytes:
        return save({name: torch.full_like(old, byte) for name, old in load(content).items()})

    return Mistake(RESUME, ("0000000004",), spoilt={f"{CHECKPOINT}/generators.safetensors": spoil},
                   baseline=chance.random() < 0.4, sealed=True)  # fmt: skip


TABLES = ("progress.csv", "eval.csv", "eval_training.csv", "gradient_cosines.csv")
NO_TABLES = (b"\0" * 50, b"\x80\xff\n", b"step,a\nx,1\n", b"step,a\n-1,1\n", b"step,a\n1.5,1\n",
             "step,a\n²,1\n".encode(),
             "step,a\n\uff14,1\n".encode(), b"step,a\n" + b"9" * 5_000 + b",1\n", b"step,a\n,1\n",
             b"step,a\n4," + b"x" * 200_000 + b"\n", pickle.dumps([1]) + b"\n")  # fmt: skip


def damaged_table(chance: random.Random) -> Mistake:
    """A table that training would go on with, whose steps are none, or that is no table."""
    name, content = chance.choice(TABLES), chance.choice(NO_TABLES)
    return Mistake(RESUME, (name,), spoilt={name: lambda _: content})


def damaged_history(chance: random.Random) -> Mistake:
    """A versions.json that holds no history."""
    content = chance.choice([b"{}", b"[3]", b"[[]]", *(text for text in NO_JSON if text != b"[]")])  # [] is empty
    return Mistake(RESUME, ("versions.json",), spoilt={"versions.json": lambda _: content})


def odd_texts(chance: random.Random) -> dict[str, Spoil]:
    """Files of which a report may make something or not."""
    ones = (b"1", b"[1]", b"[[]]", b"[{}]", b'[{"torch": 3}]', b'{"goals": 3}', b'{"goals": "ab"}', b'{"goals": [1]}',
            b'{"goals": {}}', b'{"goals": null}', b'{"goals": {"\\u001b[31m": 3}}', *NO_JSON)  # fmt: skip
    rows = b"".join(b"4,reach-v3,%d,0,1,1.0,2\n" % goal for goal in range(50))
    head = b"step,task,goal,episode,success,return,steps_to_success\n"
    tables = (head + rows, head + rows.replace(b"reach-v3", b"\x1b[31m"), head * 2 + rows, rows, head + rows * 2,
              head + rows.replace(b"4,", "²,".encode(), 3), head + rows.replace(b",1,", b",2,"), head.upper() + rows,
              b"step,step\n1,2\n", b"step\nnan\ninf\n1e308\n", b'step,"a\n1,2\n', b"step,\x1b[31m\n1,2\n",
              head + rows.replace(b"4,r", b"9" * 30 + b",r"),
              b"step,eval/success_rate\n4,9e999\n", *NO_TABLES)  # fmt: skip
    texts = {"versions.json": ones, "goals.json": ones, "command.txt": (b"\0\x1b[31m\xff", b"x" * 10**6)}
    texts |= dict.fromkeys(TABLES, tables)
    chosen = {name: chance.choice(texts[name]) for name in chance.sample(list(texts), chance.randrange(1, 4))}
    return {name: lambda _, content=content: content for name, content in chosen.items()}


IN_CHECKPOINTS: tuple[Callable[[random.Random], Mistake], ...] = (
    unknown_checkpoint, damaged_manifest, damaged_part, foreign_state, foreign_tensors, missing_part,
    foreign_generators, damaged_table, damaged_history,
)  # fmt: skip
