"""Checkpoints survive crashes and hold no pickles; run folders say what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import load_checkpoint
from tiny_world import make_world, tiny_config, tiny_sac

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.checkpoint import create_run, read_config, save_checkpoint
from mtrl_imgrad.config import Config, to_dict

CPU = torch.device("cpu")


class PowerCutError(Exception):
    pass


def save(folder: Path, step: int, value: float) -> None:
    parts = {"learner": {"weights": torch.full((3,), value), "count": torch.tensor(step)}, "replay": {}}
    save_checkpoint(folder, step, parts, {"value": value})


def value_of(folder: Path) -> float:
    """The value that a checkpoint was saved with, checked to be the same in the JSON and in the tensors."""
    state, parts = load_checkpoint(folder, CPU)
    assert parts["learner"]["weights"].tolist() == [state["value"]] * 3
    assert parts["learner"]["count"].item() == state["step"]
    return state["value"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    sac = tiny_sac(steps=60, warmup=40, batch_per_task=8)
    return train(tiny_config(folder, aggregator=Mean(), sac=sac), make_world=make_world)


class TestSaveAndLoad:
    def test_what_was_saved_is_loaded(self, tmp_path):
        parts = {
            "learner": {
                "float32": torch.randn(3, 2),
                "float64": torch.randn(2, dtype=torch.float64),
                "bool": torch.tensor([True, False]),
                "scalar": torch.tensor(7),
                "strided": torch.arange(6.0).reshape(2, 3).T,
            }
        }
        save_checkpoint(tmp_path, 10, parts, {"tasks": ["a", "b"], "envs": {"big": 2**100, "none": None}})
        state, loaded = load_checkpoint(tmp_path, CPU)
        assert state == {"format": 2, "step": 10, "tasks": ["a", "b"], "envs": {"big": 2**100, "none": None}}
        assert set(loaded) == {"learner"}
        for name, tensor in parts["learner"].items():
            assert loaded["learner"][name].dtype == tensor.dtype
            assert torch.equal(loaded["learner"][name], tensor)

    def test_only_the_newest_is_kept(self, tmp_path):
        for step in (9, 100, 1000):
            save(tmp_path, step, float(step))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000001000"]
        assert value_of(tmp_path) == 1000.0

    def test_the_same_step_can_be_saved_again(self, tmp_path):
        save(tmp_path, 10, 1.0)
        save(tmp_path, 10, 2.0)
        assert value_of(tmp_path) == 2.0
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000000010"]

    def test_what_a_user_put_beside_the_checkpoints_stays(self, tmp_path):
        save(tmp_path, 10, 1.0)
        (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
        (tmp_path / "checkpoints" / "best").mkdir()
        save(tmp_path, 20, 2.0)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000000020", "best", "notes.txt"]
        assert value_of(tmp_path) == 2.0


class TestCrashes:
    """The process dies at one of the moments of a save; what was saved before stays usable."""

    @pytest.mark.parametrize("step", [10, 20], ids=["saving the same step again", "saving a later step"])
    @pytest.mark.parametrize(
        "moment",
        ["mtrl_imgrad.checkpoint.save_file", "mtrl_imgrad.checkpoint.json.dumps", "mtrl_imgrad.checkpoint.os.replace"],
        ids=["writing tensors", "writing the state", "renaming"],
    )
    def test_a_crash_while_saving(self, tmp_path, monkeypatch, moment, step):
        save(tmp_path, 10, 1.0)

        def die(*args, **kwargs):
            raise PowerCutError

        with monkeypatch.context() as patched:
            patched.setattr(moment, die)
            with pytest.raises(PowerCutError):
                save(tmp_path, step, 2.0)
        assert value_of(tmp_path) == 1.0
        save(tmp_path, step, 3.0)
        assert value_of(tmp_path) == 3.0
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1

    @pytest.mark.parametrize("calls", [1, 2, 3], ids=["first rename", "second rename", "third rename"])
    def test_a_crash_after_a_rename(self, tmp_path, monkeypatch, calls):
        """Old or new, but one of them, whichever renaming a power cut follows."""
        save(tmp_path, 10, 1.0)
        replace, count = os.replace, 0

        def die_after(*args):
            nonlocal count
            replace(*args)
            count += 1
            if count == calls:
                raise PowerCutError

        with monkeypatch.context() as patched:
            patched.setattr("mtrl_imgrad.checkpoint.os.replace", die_after)
            try:
                save(tmp_path, 10, 2.0)
            except PowerCutError:
                assert value_of(tmp_path) in (1.0, 2.0)
            else:
                assert value_of(tmp_path) == 2.0

    def test_a_crash_while_removing_the_older_one(self, tmp_path, monkeypatch):
        save(tmp_path, 10, 1.0)

        def die(path, ignore_errors=False):
            if not ignore_errors:
                raise PowerCutError

        with monkeypatch.context() as patched:
            patched.setattr("mtrl_imgrad.checkpoint.shutil.rmtree", die)
            with pytest.raises(PowerCutError):
                save(tmp_path, 20, 2.0)
        assert value_of(tmp_path) == 2.0


class TestRunFolder:
    def test_it_holds_what_the_documentation_says(self, run):
        assert sorted(path.name for path in run.iterdir()) == [
            "checkpoints",
            "command.txt",
            "config.yaml",
            "eval.csv",
            "goals.json",
            "lock",
            "progress.csv",
            "versions.json",
        ]

    def test_nothing_in_it_is_a_pickle(self, run):
        files = [path for path in run.rglob("*") if path.is_file() and path.name != "lock"]
        assert {path.suffix for path in files} == {
            ".txt",
            ".yaml",
            ".csv",
            ".json",
            ".safetensors",
        }
        for path in files:
            assert not path.read_bytes().startswith((b"\x80", b"PK")), f"{path} looks like a pickle or a torch archive"

    def test_its_configuration_is_read_back(self, run):
        sac = tiny_sac(steps=60, warmup=40, batch_per_task=8)
        assert read_config(run) == tiny_config(run, aggregator=Mean(), sac=sac)

    @pytest.mark.parametrize(
        "content",
        [b"", b"- a", b"\xff\xfe\x00\x80", b"a: [", b"sac: 3", b"seeds: 3", b"sac: {stepz: 3}", b"sac: {steps: many}"],
        ids=["empty", "list", "binary", "broken", "section", "unknown field", "unknown entry", "wrong type"],
    )
    def test_a_spoilt_configuration_is_told_in_one_line(self, tmp_path, content):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"\w+") as caught:
            read_config(tmp_path)
        assert "\n" not in str(caught.value)

    def test_a_folder_without_a_configuration_is_no_run(self, tmp_path):
        with pytest.raises(ValueError, match=r"run: .* is no run folder"):
            read_config(tmp_path)

    def test_a_folder_without_a_checkpoint_says_so(self, tmp_path):
        with pytest.raises(ValueError, match=r"run: .* has no checkpoint yet"):
            load_checkpoint(tmp_path, CPU)

    def test_a_checkpoint_of_another_format_is_refused(self, tmp_path):
        save(tmp_path, 10, 1.0)
        path = tmp_path / "checkpoints" / "0000000010" / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
        with pytest.raises(ValueError, match=r"format 0; this version reads 2"):
            load_checkpoint(tmp_path, CPU)

    @pytest.mark.parametrize("name", ["state.json", "learner.safetensors"])
    def test_a_spoilt_checkpoint_is_told_as_a_value_error(self, tmp_path, name):
        save(tmp_path, 10, 1.0)
        (tmp_path / "checkpoints" / "0000000010" / name).write_bytes(b"spoilt")
        with pytest.raises(ValueError, match=r"run: .*0000000010"):
            load_checkpoint(tmp_path, CPU)

    def test_the_default_configuration_round_trips_through_yaml(self, tmp_path):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
        assert read_config(tmp_path) == Config()


class TestRunFolders:
    def test_runs_that_start_together_get_different_folders(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        locks = [create_run(Config(), {}) for _ in range(3)]
        assert [lock.folder.name for lock in locks] == ["mt10-imgrad-s1", "mt10-imgrad-s1-2", "mt10-imgrad-s1-3"]

    def test_a_folder_that_a_killed_process_was_making_is_taken_again(self, tmp_path):
        config = Config(run_dir=str(tmp_path / "run"))
        create_run(config, {}).release()
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "lock"}
        (tmp_path / "run" / "config.yaml").rename(tmp_path / "run" / "config.yaml.tmp")
        create_run(config, {}).release()
        assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "lock"} == before

    def test_a_folder_with_anything_else_is_left_alone(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").write_text("mine")
        with pytest.raises(FileExistsError, match=r"run_dir: .* exists and is not empty"):
            create_run(Config(run_dir=str(tmp_path / "run")), {})
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]

    def test_a_rule_that_no_other_process_can_import_leaves_no_folder(self, tmp_path):
        rule = dataclasses.make_dataclass("Rule", [], bases=(Mean,), frozen=True)
        rule.__module__ = "__main__"
        with pytest.raises(ValueError, match="Rule is defined in a script"):
            create_run(Config(run_dir=str(tmp_path / "run"), aggregator=rule()), {})
        assert list(tmp_path.iterdir()) == []
