"""A run folder may come from anywhere: nothing that is read from it is executed, and nothing leads out of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from tiny_world import make_world, tiny_config, tiny_sac

from mtrl_imgrad import cli, load, train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.config import CheckpointConfig, EvalConfig, LogConfig, NetworkConfig
from mtrl_imgrad.trainer import open_run


class Malicious:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with every kind of file, its tasks named so that Meta-World's goals are not needed."""
    config = tiny_config(
        tmp_path_factory.mktemp("untrusted") / "run",
        aggregator=Mean(),
        sac=tiny_sac(steps=60, warmup=20, batch_per_task=8),
        network=NetworkConfig(kind="multi_head", width=8, depth=1),
        eval=EvalConfig(every=30, goals_per_task=3, horizon=10),
        log=LogConfig(every=20, tensorboard=True),
        checkpoint=CheckpointConfig(every=30),
    )
    return train(config, make_world=make_world)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """The command line trains in the tiny world, and evaluates and records in it."""

    def open_tiny(config, resume=None, world=make_world, started=None):
        return open_run(config, resume, make_world, started)

    monkeypatch.setattr("mtrl_imgrad.trainer.open_run", open_tiny)
    monkeypatch.setattr("mtrl_imgrad.agent.metaworld", make_world)


def plant(folder: Path, name: str, trace: Path) -> None:
    """Put the pickle under a name, as an attacker would: in a checkpoint, with a manifest that vouches for it."""
    content = pickle.dumps(Malicious(trace))
    for path in folder.glob(name):
        path.unlink()
        path.write_bytes(content)
        manifest = path.parent / "manifest.json"
        if manifest.is_file() and path != manifest:
            entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            plain = json.loads(manifest.read_text())
            plain["files"][path.name] = entry
            manifest.write_text(json.dumps(plain))


NAMES = (
    *("config.yaml", "command.txt", "versions.json", "goals.json", "progress.csv", "eval.csv", "eval_best.csv"),
    *("eval_training.csv", "gradient_cosines.csv", "lock", "tensorboard/*"),
    *(f"checkpoints/*/{name}" for name in ("manifest.json", "state.json", "learner.safetensors")),
    *(f"checkpoints/0*/{name}.safetensors" for name in ("generators", "rewards", "averages", "cosines", "episodes")),
    "checkpoints/0*/replay-*.safetensors",
)


def test_the_pickle_would_do_it(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_every_file_of_a_run_is_among_the_names(run):
    covered = {path for name in NAMES for path in run.glob(name)}
    assert {path for path in run.rglob("*") if path.is_file()} == covered


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_under_any_name_is_not_executed_and_is_told_in_one_line(run, tmp_path, name, capsys):
    """A file that a command does not read may hold anything: the command then does its work."""
    folder, trace = tmp_path / "run", tmp_path / "trace"
    commands = (
        ["evaluate", "run"],
        ["evaluate", "run", "--checkpoint", "best"],
        ["record", "run", "--episodes", "1"],
        ["report", "run", "--out", str(tmp_path / "report")],
        ["train", "--resume", "run", "--sac.steps", "80", "--log.tensorboard", "False"],
    )
    refused = 0
    for command in commands:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, folder)
        plant(folder, name, trace)
        code = cli.main([str(folder) if word == "run" else word for word in command])
        said = capsys.readouterr().err
        assert not trace.exists(), command
        assert code in (0, 2), command
        lines = [line for line in said.splitlines() if line.startswith("mtrl-imgrad: ")]
        assert len(lines) == (code == 2), said
        assert "Traceback" not in said
        refused += code == 2
    if name.startswith("checkpoints") or name in ("config.yaml", "goals.json", "versions.json", "progress.csv"):
        assert refused
    with contextlib.suppress(ValueError):  # and no other error
        load(folder)
    assert not trace.exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["goals.json", "progress.csv", "lock", "checkpoints/odd"])
def test_a_pipe_or_links_in_a_circle_are_refused_by_name_and_nobody_waits(run, tmp_path, name, capsys):
    for number, kind in enumerate(("pipe", "circle")):
        folder = tmp_path / str(number)
        shutil.copytree(run, folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to(folder / name)
        for command in (["evaluate"], ["record"], ["report"], ["train", "--resume"]):
            assert cli.main([*command, str(folder)]) == 2
            assert f"{name} is neither a file nor a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["command.txt", "lock", "progress.csv", "checkpoints", "tensorboard"])
def test_a_link_out_of_the_run_folder_is_refused_before_anything_is_written(run, tmp_path, name, capsys):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(run, folder)
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in (["evaluate"], ["record"], ["report"], ["train", "--resume"]):
        assert cli.main([*command, str(folder)]) == 2
        assert f"{name} is a link that leads out of the run folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
