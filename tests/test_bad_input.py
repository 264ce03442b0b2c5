"""Bad input: hundreds of wrong command lines and files, each told in two lines, with nothing done before.

The mistakes come from a seeded generator (`mistakes`), so that the same ones come again. The larger run:

    pytest -m slow tests/test_bad_input.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import yaml
from mistakes import BAD_FILES, Mistake
from mistakes_in_checkpoints import IN_CHECKPOINTS, odd_texts
from mistakes_in_commands import IN_COMMANDS
from mistakes_in_configs import IN_CONFIGS

from mtrl_imgrad.cli import main
from mtrl_imgrad.config import Config, to_dict
from mtrl_imgrad.overlays import parse_config
from mtrl_imgrad.parsing import UserError, printable
from mtrl_imgrad.run_description import read_config

KINDS = (*IN_CONFIGS, *IN_COMMANDS, *IN_CHECKPOINTS)
PER_KIND, PER_KIND_SLOWLY = 12, 110
REMEDIES = tuple(
    """must, allowed, nearest, between, see `, did you mean, at least, at most, there are, choose, missing,
    does not use,
    cannot, no run folder, needs, no such field, is given twice, as the run wrote, give run folders, given are, use ,
    has no, above, no file, is for""".replace("\n    ", " ").split(", ")
)
"""What a message that says what is right has one of."""
LONGEST_LINE = 1_000
"""Characters that a reader still finds the beginning and the end of."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two runs of a few steps on one of Meta-World's tasks: `run`, and `baseline` of stable-baselines3."""
    place = tmp_path_factory.mktemp("trained")
    flags = """--benchmark reach-v3 --device cpu --threads 1 --envs.workers 0 --envs.self-check off
        --envs.horizon 2 --eval.horizon 2 --eval.every 0 --eval.final False
        --sac.steps 4 --log.tensorboard False --checkpoint.every 0"""
    ours = """--aggregator mean --network.width 4 --network.depth 1 --sac.warmup 4 --sac.batch-per-task 2
        --replay.capacity 50 --compile False"""
    theirs = "--algorithm sb3-sac --sb3.net-arch 4 --sb3.batch-size 2 --sb3.buffer-size 50 --sac.warmup 1"
    for name, own in (("run", ours), ("baseline", theirs)):
        assert main(["train", *flags.split(), *own.split(), "--run-dir", str(place / name)]) == 0
    return place


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that would start to work fail instead: what is wrong must be told before."""

    def started(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the command was taken for right and began its work")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(subprocess, "Popen", started)
    for place in ("trainer.run_training", "trainer.run_sb3_training", "comparison.command.tell_start",
                  "comparison.command.measure", "playback.play", "evaluation.evaluate", "agent.evaluate"):  # fmt: skip
        monkeypatch.setattr(f"mtrl_imgrad.{place}", started)
    monkeypatch.setattr("mtrl_imgrad.envs.rendering.graphics_library", lambda: None)  # as if there were one


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by path."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def prepare(folder: Path, mistake: Mistake, trained: Path) -> None:
    """Write the mistake's files, and the copy of the run folder where it reads one."""
    for name, data in mistake.files.items():
        (folder / name).write_bytes(data)
    if "spoilt" in mistake.arguments:
        shutil.copytree(trained / ("baseline" if mistake.baseline else "run"), folder / "spoilt")
        for name, spoil in mistake.spoilt.items():
            for path in list((folder / "spoilt").glob(name)) or [folder / "spoilt" / name]:
                data = spoil(path.read_bytes() if path.exists() else b"")
                path.unlink(missing_ok=True)
                if data is not None:
                    path.write_bytes(data)
                if mistake.sealed:
                    seal(path, data)


def seal(path: Path, data: bytes | None) -> None:
    """Let a checkpoint's manifest vouch for a file's new content, or not name it where there is none."""
    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    del manifest["files"][path.name]
    if data is not None:
        manifest["files"][path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def faults(code: object, out: str, err: str, names: tuple[str, ...]) -> list[str]:
    """What is wrong with the answer to a mistake; nothing if it is as promised."""
    lines = err.splitlines()
    text = err.removesuffix("\n").replace("\n", "")
    return [
        message
        for holds, message in (
            (code == 2, f"exit code {code}"),
            (out == "", f"standard output: {out[:200]!r}"),
            (1 <= len(lines) <= 2 and all(line.strip() for line in lines), f"{len(lines)} lines"),
            (err.startswith("mtrl-imgrad: "), "it does not say which program speaks"),
            (text.isprintable(), "control characters reach the terminal"),
            (
                max(map(len, lines), default=0) <= LONGEST_LINE,
                f"a line of {max(map(len, lines), default=0)} characters",
            ),
            (any(name in err for name in names), f"it names none of {names}"),
            (any(remedy in err.lower() for remedy in REMEDIES), "it says no remedy"),
        )
        if not holds
    ]


def run(kind: Callable[[random.Random], Mistake], number: int, place: Path, trained: Path, capsys) -> str:
    """One mistake of a kind; returns what is wrong with the answer, empty if nothing."""
    mistake = kind(random.Random(f"{kind.__name__} {number}"))
    folder = place / str(number)
    folder.mkdir()
    prepare(folder, mistake, trained)
    before, path = content(folder), list(sys.path)
    os.chdir(folder)
    try:
        code: object = main(list(mistake.arguments))
    except SystemExit as stop:
        code = f"SystemExit({stop.code})"
    except BaseException as error:  # every one of the mistakes is to be seen, also after a traceback
        if isinstance(error, KeyboardInterrupt):
            raise
        code = f"{type(error).__name__}({str(error)[:300]!r})"
    finally:
        os.chdir(place)
    said = capsys.readouterr()
    found = faults(code, said.out, said.err, mistake.names)
    if content(folder) != before:
        found.append(f"left on disk: {sorted(set(content(folder)) ^ set(before)) or 'a changed file'}")
    if sys.path != path:
        found.append("sys.path is changed")
    shown = " ".join(ascii(word[:60]) for word in mistake.arguments)
    extra = {name: data[:80] for name, data in mistake.files.items()} if "my.yaml" in shown else {}
    extra |= dict.fromkeys(mistake.spoilt, "")
    for name in mistake.spoilt:
        for path in (folder / "spoilt").glob(name):
            extra[name] = path.read_bytes()[:300]
    shutil.rmtree(folder)
    return f"{number}: {shown} {extra or ''}\n    {'; '.join(found)}\n    {said.err[:600]!r}" if found else ""


@pytest.mark.timeout(1800)  # none of them may hang
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestMistakes:
    def test_cost_two_lines_and_do_nothing(self, kind, idle, tmp_path, trained, capsys):
        bad = [told for number in range(PER_KIND) if (told := run(kind, number, tmp_path, trained, capsys))]
        assert not bad, "\n".join(bad)

    @pytest.mark.slow
    def test_many_more_of_them_cost_two_lines_and_do_nothing(self, kind, idle, tmp_path, trained, capsys):
        numbers = range(PER_KIND, PER_KIND + PER_KIND_SLOWLY)
        bad = [told for number in numbers if (told := run(kind, number, tmp_path, trained, capsys))]
        assert not bad, "\n".join(bad)


@pytest.mark.parametrize("number", range(24))
def test_a_report_of_odd_files_is_made_or_told_in_two_lines(number, tmp_path, trained, capsys):
    odd = Mistake(("report", "spoilt"), ("spoilt",), spoilt=odd_texts(random.Random(number)))
    prepare(tmp_path, odd, trained)
    code = main(["report", str(tmp_path / "spoilt"), "--out", str(tmp_path / "report")])
    said = capsys.readouterr()
    if code == 0:
        assert said.err == ""
        assert (tmp_path / "report" / "index.html").stat().st_size > 0
        assert said.out.replace("\n", "").isprintable()
    else:
        assert not faults(code, said.out, said.err, odd.names)
        assert not (tmp_path / "report").exists()


DAMAGED = {
    "config.yaml": b"\0",
    "versions.json": b"3",
    "goals.json": b'{"goals": 3}',
    "eval.csv": b"x" * 200_000 + b"\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_run_of_a_comparison_is_named_and_only_it_fails(name, tmp_path, trained, capsys):
    words = ["compare", "--aggregators", "mean", "--seeds", "1", "--out", str(tmp_path / "all"), "--device", "cpu"]
    shutil.copytree(trained / "run", tmp_path / "all" / "mean-s1")
    (tmp_path / "all" / "mean-s1" / name).write_bytes(DAMAGED[name])
    before = content(tmp_path)
    code = main([*words, "--dry-run"])
    said = capsys.readouterr()
    assert not faults(code, said.out, said.err, ("mean-s1",))
    assert content(tmp_path) == before
    assert main(words) == 1  # the other runs, of which there are none here, were trained
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mtrl-imgrad: mean-s1 failed, run: ")


def test_there_are_at_least_300_mistakes_and_3000_slow_ones():
    assert PER_KIND * len(KINDS) >= 300
    assert PER_KIND_SLOWLY * len(KINDS) >= 3_000


RIGHT = {
    "a byte order mark": b"\xef\xbb\xbfseed: 3\n",
    "an alias of a number": b"sac: {steps: &n 4000, warmup: *n}\n",
    "other letters": "run_dir: L\u00e4ufe/\u5b9f\u9a13\n".encode(),
    "a value that looks like an option": b'run_dir: "--seed"\n',
    "numbers at their limits": b"seed: 4294967295\nnetwork: {width: 16384}\nsac: {steps: 1000000000000000}\n",
    "null where it means automatic": b"envs: {workers: null, goal_seed: null}\n",
    "a whole number for a fraction": b"sac: {gamma: 1, target_entropy: -4}\n",
    "YAML's other truth values": b"compile: no\nlog: {wandb: off}\n",
    "nothing in a section": b"sac: {}\n",
    "a list": b"benchmark: {tasks: [push-v3, reach-v3]}\n",
}  # fmt: skip
"""Overlays near to mistakes that are none."""


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_refused_and_survives_a_run_folder(name, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes(RIGHT[name])
    config = parse_config(["--config", str(path)])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert to_dict(read_config(tmp_path)) == to_dict(config)
    assert to_dict(config) != to_dict(Config()) or name in ("null where it means automatic", "nothing in a section")


def test_a_later_flag_wins_over_the_same_flag_and_over_an_overlay():
    assert parse_config(["--config", "quickstart", "--seed=3", "--seed", "4"]).seed == 4


def test_a_list_in_an_overlay_cannot_smuggle_in_an_option(tmp_path):
    (tmp_path / "my.yaml").write_text("benchmark: {tasks: [reach-v3, '--seed', '3']}")
    with pytest.raises(UserError, match=r"benchmark\.tasks: '--seed' cannot be a value"):
        parse_config(["--config", str(tmp_path / "my.yaml")])


def test_a_message_keeps_both_its_ends_and_shows_what_would_steer_a_terminal():
    shown = printable(f"field: {'x' * 10_000}\x1b[31m\rmust be short\nSee\nthere")
    first, second = shown.split("\n")
    assert first.startswith("field: xxx")
    assert first.endswith("x\\x1b[31m\\rmust be short")
    assert second == "See there"
    assert len(first) <= LONGEST_LINE


def test_an_alias_bomb_needs_no_memory(tmp_path):
    """Written out it has 9**21 words."""
    (tmp_path / "bomb.yaml").write_bytes(BAD_FILES["alias bomb"])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="alias"):
            parse_config(["--config", str(tmp_path / "bomb.yaml")])
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
