"""The wandb sink, with a module that stands for wandb and keeps what it is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_world import PowerCutError, dying_world, make_world, tiny_config, tiny_sac

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.cli import main
from mtrl_imgrad.config import CheckpointConfig, Config, LogConfig, to_dict
from mtrl_imgrad.overlays import parse_config


class FakeWandb(ModuleType):
    """What of wandb is used."""

    class Error(Exception):
        pass

    def __init__(self, mode: str = "offline", project: str | None = None, logged_in: bool = True) -> None:
        super().__init__("wandb")
        self.settings = SimpleNamespace(mode=mode, project=project)
        self.logged_in = logged_in
        self.begun: list[dict[str, Any]] = []
        self.event_files: list[int] = []
        self.exit_codes: list[int] = []

    def setup(self) -> SimpleNamespace:
        return SimpleNamespace(settings=self.settings)

    def login(self) -> None:
        if not self.logged_in:
            raise self.Error("No API key\nconfigured.")

    def init(self, **arguments: Any) -> SimpleNamespace:
        self.begun.append(arguments)
        self.event_files.append(len(list((arguments["dir"] / "tensorboard").glob("*"))))
        return SimpleNamespace(finish=lambda exit_code: self.exit_codes.append(exit_code))


@pytest.fixture
def install(monkeypatch):
    def install(wandb: ModuleType | None) -> Any:
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return install


def run_config(run_dir: Path) -> Config:
    sac = tiny_sac(steps=60, warmup=40, batch_per_task=8)
    log = LogConfig(every=20, wandb=True)
    return tiny_config(run_dir, aggregator=Mean(), sac=sac, log=log, checkpoint=CheckpointConfig(every=30))


def test_a_run_is_sent_under_its_folder_s_name_with_its_configuration(tmp_path, install):
    wandb = install(FakeWandb())
    config = run_config(tmp_path / "my-run")
    train(config, make_world=make_world)
    (begun,) = wandb.begun
    assert begun["name"] == "my-run"
    assert begun["project"] == "mtrl_imgrad"
    assert begun["config"] == to_dict(config)
    assert begun["sync_tensorboard"] is True
    assert begun["dir"] == tmp_path / "my-run"
    assert wandb.event_files == [0]  # wandb follows only what is written after its start
    assert wandb.exit_codes == [0]


def test_the_user_s_project_is_heeded(tmp_path, install):
    wandb = install(FakeWandb(project="mine"))
    train(run_config(tmp_path / "run"), make_world=make_world)
    assert wandb.begun[0]["project"] == "mine"


def test_a_resumed_run_keeps_its_identity_and_another_has_its_own(tmp_path, install):
    wandb = install(FakeWandb())
    config = run_config(tmp_path / "run")
    with pytest.raises(PowerCutError):
        train(config, make_world=dying_world(55))
    train(config, resume=tmp_path / "run", make_world=make_world)
    train(run_config(tmp_path / "other"), make_world=make_world)
    first, resumed, other = (begun["id"] for begun in wandb.begun)
    assert first == resumed != other
    assert {begun["resume"] for begun in wandb.begun} == {"allow"}
    assert wandb.exit_codes == [1, 0, 0]


def test_without_the_flag_nothing_is_sent(tmp_path, install):
    wandb = install(FakeWandb())
    sac = tiny_sac(steps=60, warmup=40, batch_per_task=8)
    folder = train(tiny_config(tmp_path / "run", aggregator=Mean(), sac=sac), make_world=make_world)
    assert wandb.begun == []
    assert not (folder / "wandb_id.txt").exists()


@pytest.mark.parametrize(
    ("wandb", "said"),
    [
        (None, 'pip install "mtrl_imgrad[wandb]"'),
        (FakeWandb("online", logged_in=False), "No API key configured. WANDB_MODE=offline needs no key."),
    ],
    ids=["not installed", "not logged in"],
)
def test_where_it_cannot_be_sent_the_user_is_told_before_there_is_a_folder(tmp_path, install, capsys, wandb, said):
    install(wandb)
    assert main(["train", "--config", "quickstart", "--wandb", "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "log.wandb" in error
    assert said in error
    assert len(error.splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_it_needs_tensorboard(capsys):
    assert main(["train", "--config", "quickstart", "--wandb", "--log.tensorboard", "False"]) == 2
    assert "log.wandb: True is not allowed; it must be false without log.tensorboard" in capsys.readouterr().err


def test_the_short_flag_is_the_field():
    short, long = (parse_config(["--config", "quickstart", *flags]) for flags in (["--wandb"], ["--log.wandb", "True"]))
    assert to_dict(short) == to_dict(long)
    assert short.log.wandb
    assert not parse_config(["--config", "quickstart"]).log.wandb
