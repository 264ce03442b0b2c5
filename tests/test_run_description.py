"""Run folders are made once, describe their run, and say what is wrong with them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny_world import make_world, tiny_config, tiny_sac

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.config import Config, to_dict
from mtrl_imgrad.run_description import command_line, create_run, processor, read_config, source_commit


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    sac = tiny_sac(steps=60, warmup=40, batch_per_task=8)
    return train(tiny_config(folder, aggregator=Mean(), sac=sac), make_world=make_world)


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

    def test_it_says_what_ran_and_where(self, run):
        (entry,) = json.loads((run / "versions.json").read_text())
        assert entry["commit"] == source_commit()
        assert entry["processor"] == processor() != ""
        assert entry["cores"] == os.cpu_count()

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC", "AMD EPYC, family 26, model 2"),
            ("model name\t: ARMv7 Processor rev 4 (v7l)", "ARMv7 Processor rev 4 (v7l)"),
            ("CPU architecture: 8", platform.processor() or platform.machine()),
        ],
    )
    def test_a_processor_is_told_from_others_of_its_name(self, lines, said, tmp_path):
        cpuinfo = tmp_path / "cpuinfo"
        other = "\n\nmodel name\t: another core"
        cpuinfo.write_text(f"processor\t: 0\n{lines}{other}\n")
        assert processor(cpuinfo) == said
        cpuinfo.unlink()
        assert processor(cpuinfo) == (platform.processor() or platform.machine())

    @pytest.mark.parametrize(
        ("program", "typed"),
        [
            ("/opt/venv/bin/mtrl-imgrad", "mtrl-imgrad"),
            ("/opt/venv/lib/mtrl_imgrad/__main__.py", "python -m mtrl_imgrad"),
            ("my study.py", "'my study.py'"),
        ],
    )
    def test_its_command_can_be_typed_again_and_names_no_place_of_the_program(self, program, typed):
        assert command_line([program, "train", "--run-dir", "a b"]) == f"{typed} train --run-dir 'a b'"

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


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_that_of_the_files_own_checkout(tmp_path, monkeypatch):
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for name, value in identity.items():
        monkeypatch.setenv(name, value)
    tracked, other = tmp_path / "package.py", tmp_path / "other.py"
    for path in (tracked, other):
        path.write_text("old\n")
    for arguments in (["init"], ["add", tracked.name], ["commit", "-m", "first"], ["tag", "v1"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    head = (tmp_path / ".git/logs/HEAD").read_text().split()[1]
    assert source_commit(tracked) == head
    assert source_commit(other) == ""
    tracked.write_text("new\n")
    assert source_commit(tracked) == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit(tracked) == "", "without git"
