"""The command line: what it accepts, what it says, and that a mistake costs two lines and leaves nothing behind."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_world import TinyVectorEnv, make_world, tiny_config

from mtrl_imgrad import cli, config_sections, train
from mtrl_imgrad import config as config_module
from mtrl_imgrad.aggregators import AGGREGATORS, CAGrad, ConicGrad, IMGrad, Mean
from mtrl_imgrad.cli import main
from mtrl_imgrad.config import Config, EvalConfig, LogConfig, NetworkConfig, aggregator_name, to_dict
from mtrl_imgrad.files import FolderLock
from mtrl_imgrad.listing import COLUMNS
from mtrl_imgrad.overlays import field_names, parse_config
from mtrl_imgrad.trainer import open_run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
USER_RULE = """
from dataclasses import dataclass

import torch

from mtrl_imgrad.aggregators import Aggregation, Aggregator


@dataclass(frozen=True)
class InverseNorm(Aggregator):
    '''Weights proportional to 1 / norm.'''

    power: float = 1.0
    '''Exponent of the norm.'''

    def solve(self, given):
        norms = given.gramian.diagonal(dim1=-2, dim2=-1).sqrt()
        weights = torch.where(given.active, norms, 1.0).pow(-self.power) * given.active
        return Aggregation(weights / weights.sum(-1, keepdim=True))


class NoRule:
    pass
"""
FILES = {
    "binary.yaml": b"\x80\x81\xff\x00",
    "empty.yaml": b"",
    "list.yaml": b"- sac\n- envs\n",
    "broken.yaml": b"sac: [1\nenvs: }",
    "unknown_field.yaml": b"sac: {stepz: 3}",
    "unknown_section.yaml": b"sack: {steps: 3}",
    "wrong_type.yaml": b"sac: {steps: many}",
    "out_of_range.yaml": b"sac: {gamma: 2}",
    "scalar_section.yaml": b"sac: 3",
    "scalar_rule.yaml": b"aggregator: imgrad",
    "number_key.yaml": b"1: 3",
    "no_tasks.yaml": b"benchmark: {tasks: []}",
    "failing_module.py": b"raise RuntimeError('first line\\nsecond line')",
    "my_rules.py": USER_RULE.encode(),
}

# command line -> what the message must name
MISTAKES = {
    "train --sac.stepz 3": "sac.stepz: .*--sac.steps",
    "train --sac.stepz=3": "sac.stepz: .*--sac.steps",
    "train --sack.steps 3": "sack.steps: .*--sac.steps",
    "train --sac 3": "sac: ",
    "train --sac.steps many": "--sac.steps.*'many'",
    "train --sac.gamma high": "--sac.gamma.*'high'",
    "train --envs.goal-seed 1.5": "--envs.goal-seed.*'1.5'",
    "train --sac.steps 0": "sac.steps: 0 is not allowed; it must be between 1 and",
    "train --sac.gamma 1.5": "sac.gamma: 1.5 .*between 0 and 1",
    "train --sac.gamma nan": "sac.gamma: nan",
    "train --sac.actor-lr -1": "sac.actor_lr: -1.0 .*positive",
    "train --benchmark.goals 51": "benchmark.goals: 51 .*between 1 and 50",
    "train --envs.horizon 501": "envs.horizon: 501",
    "train --eval.horizon 0": "eval.horizon: 0",
    "train --log.every 0": "log.every: 0",
    "train --seed -1": "seed: -1",
    "train --replay.capacity 1": "replay.capacity: 1 .*n_step x envs_per_task = 1",
    "train --network.share-encoder True --network.depth 1": "network.depth: 1",
    "train --network.kind cnn": "'cnn'.*--network.kind.*'mlp', 'multi_head'",
    "train --network.share-encoder maybe": "'maybe'.*--network.share-encoder.*'True', 'False'",
    "train --algorithm sb3": "'sb3'.*--algorithm.*'sb3-sac'",
    "train --algorithm sb3-sac --aggregator mean": "aggregator: --algorithm sb3-sac does not use this field",
    "train --algorithm sb3-sac --aggregator.c 0.4": "aggregator.c: --algorithm sb3-sac does not use",
    "train --algorithm sb3-sac-blind --network.width 8": "network.width: --algorithm sb3-sac-blind does not use",
    "train --algorithm sb3-sac --sac.batch-per-task=8": "sac.batch_per_task: .*the fields --sb3",
    "train --algorithm sb3-sac --compile False": "compile: --algorithm sb3-sac does not use",
    "train --sb3.gamma 0.5": "sb3.gamma: --algorithm mtsac does not use this field",
    "train --algorithm sb3-sac --sb3.ent-coef auto_x": "sb3.ent_coef: 'auto_x' .*auto, auto_X or X",
    "train --device mps": "'mps'.*--device",
    "train --sac.steps": "--sac.steps",
    "train --sac.steps 3 4": "4",
    "train stray": "stray",
    "train --config": "--config: a value is missing",
    "train --config --seed 3": "--config: a value is missing",
    "train --benchmark": "--benchmark: a value is missing",
    "train --aggregator": "--aggregator: a value is missing",
    "train --resume": "--resume: a value is missing",
    "train --config quikstart": "config: .*'quikstart'.*'quickstart'",
    "train --config missing/file.yaml": "config: .*'missing/file.yaml'",
    "train --config .": "config: ",
    "train --config binary.yaml": "config: binary.yaml",
    "train --config empty.yaml": "config: empty.yaml: .*mapping",
    "train --config list.yaml": "config: list.yaml: .*mapping.*list",
    "train --config broken.yaml": "config: broken.yaml",
    "train --config unknown_field.yaml": "sac.stepz: .*--sac.steps",
    "train --config unknown_section.yaml": "sack.steps: .*--sac.steps",
    "train --config wrong_type.yaml": "sac.steps.*'many'",
    "train --config out_of_range.yaml": "sac.gamma: 2",
    "train --config scalar_section.yaml": "sac: ",
    "train --config scalar_rule.yaml": "aggregator: 'imgrad'",
    "train --config number_key.yaml": "1: ",
    "train --config no_tasks.yaml": "benchmark.tasks: ",
    "train --benchmark MT11": "'MT11'.*'MT10'",
    "train --benchmark reach-v2": "'reach-v2'.*'reach-v3'",
    "train --benchmark.tasks reach-v3 reach-v3": "'reach-v3' is given twice",
    "train --aggregator imgard": "aggregator: .*'imgard'.*'imgrad'",
    "train --aggregator imgrad --aggregator.c -1": "c: .*-1.0",
    "train --aggregator imgrad --aggregator.variant eq10": "--aggregator.variant|variant: .*eq10",
    "train --aggregator mean --aggregator.c 1": "aggregator.c: ",
    "train --aggregator missing_module:Rule": "aggregator: .*missing_module",
    "train --aggregator failing_module:Rule": "aggregator: .*failing_module.*RuntimeError",
    "train --aggregator my_rules:InverseNrm": "aggregator: .*InverseNrm.*'InverseNorm'",
    "train --aggregator my_rules:NoRule": "aggregator: .*not a dataclass derived",
    "train --benchmark reach-v3 push-v3": "--benchmark: one value .*'push-v3'",
    "train --aggregator :": "aggregator: ",
    "train --aggregator my_rules:InverseNorm --aggregator.powr 1": "aggregator.powr: .*--aggregator.power",
    "train --resume missing": "run: missing is no run folder",
    "train --resume .": "run: . is no run folder",
    "train --run-dir empty.yaml --benchmark reach-v3": "run_dir: .*empty.yaml",
    "train --run-dir . --benchmark reach-v3": "run_dir: .*--resume",
    "train --replay.capacity 10000000000000 --benchmark reach-v3": "replay.capacity: .*GiB",
    "train --envs.goal-seed -3 --benchmark reach-v3": "envs.goal_seed: -3",
    "evaluate": "RUN|PATH|run",
    "evaluate missing": "run: missing is no run folder",
    "evaluate . --device tpu": "'tpu'.*--device",
    "evaluate . .": r"\.",
    "evaluate . --devise cpu": "--devise",
    "list": "tasks,aggregators,configs",
    "list nothing": "'nothing'.*'tasks', 'aggregators', 'configs'",
    "list tasks more": "more",
    "trian": "'trian' is no command; the nearest is 'train'",
    "--seed 3": "'--seed' is no command",
}
if not torch.cuda.is_available():
    MISTAKES["train --device cuda --benchmark reach-v3"] = "device: 'cuda' .*'auto' and 'cpu'"


def fails(capsys, *arguments: str) -> str:
    """Runs a command that is a user's mistake and returns its one or two lines."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert 1 <= len(lines) <= 2, said.err
    assert lines[0].startswith("mtrl-imgrad: ")
    assert all(line.strip() for line in lines)
    assert "Traceback" not in said.err
    assert not re.search("[│╭╮╰╯]|\x1b", said.err)
    assert said.out == ""
    return said.err


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the mistakes speak of."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for module in ("my_rules", "failing_module"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Commands train on the tiny world instead of Meta-World."""

    def open_tiny(config, resume=None, world=make_world, started=None):
        return open_run(config, resume, world, started)

    monkeypatch.setattr("mtrl_imgrad.trainer.open_run", open_tiny)


TINY_COMMAND = """
    --benchmark.tasks east north --benchmark.goals 4 --aggregator mean --device cpu --network.width 8 --network.depth 2
    --envs.horizon 10 --eval.horizon 10 --eval.every 0 --sac.steps 40 --sac.warmup 20 --sac.batch-per-task 8
    --log.every 20 --log.tensorboard False --compile False"""
TINY_FLAGS = TINY_COMMAND.split()


class TestMistakes:
    @pytest.mark.parametrize("command", MISTAKES)
    def test_exit_code_2_one_or_two_lines_and_nothing_on_disk(self, work, capsys, command):
        message = fails(capsys, *command.split())
        assert re.search(MISTAKES[command], message), message
        assert {path.name for path in work.iterdir()} == set(FILES)

    def test_a_whole_process_says_the_same(self, work):
        command = [sys.executable, "-m", "mtrl_imgrad", "train", "--sac.stepz", "3"]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.splitlines() == [
            "mtrl-imgrad: sac.stepz: there is no such field; the nearest is --sac.steps.",
            "See `mtrl-imgrad train --help`.",
        ]

    def test_a_resumed_run_cannot_become_another(self, work, tiny, capsys):
        assert main(["train", *TINY_FLAGS, "--run-dir", "run"]) == 0
        capsys.readouterr()
        before = {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()}
        for flags, message in {
            "--sac.gamma 0.5": "sac.gamma: the run has 0.99, and a resumed run cannot change it to 0.5",
            "--seed 2": "seed: the run has 1, .* 2",
            "--aggregator imgrad": "aggregator.name: the run has 'mean', .* 'imgrad'",
            "--benchmark.tasks east": r"benchmark.tasks: the run has \['east', 'north'\], .* \['east'\]",
            "--network.kind multi_head": "network.kind: the run has 'mlp'",
            "--config quickstart": "the run has",
            "--sac.steps 20": "sac.steps: the run has a checkpoint at step 40, so 20 is too few to resume it",
        }.items():
            assert re.search(message, fails(capsys, "train", "--resume", "run", *flags.split()))
        assert {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()} == before

    def test_a_run_without_a_checkpoint_is_resumed_from_the_start_and_not_evaluated(self, work, tiny, capsys):
        assert main(["train", *TINY_FLAGS, "--run-dir", "run"]) == 0
        before = (work / "run" / "eval.csv").read_bytes()
        capsys.readouterr()
        shutil.rmtree(work / "run" / "checkpoints")
        (work / "run" / "eval.csv").unlink()
        assert "has no checkpoint yet" in fails(capsys, "evaluate", "run")
        assert main(["train", "--resume", "run"]) == 0
        assert (work / "run" / "eval.csv").read_bytes() == before

    def test_two_processes_cannot_train_in_one_folder(self, work, tiny, capsys):
        assert main(["train", *TINY_FLAGS, "--run-dir", "run"]) == 0
        capsys.readouterr()
        lock = FolderLock(work / "run")
        message = fails(capsys, "train", "--resume", "run", "--sac.steps", "80")
        assert re.search(rf"run: run is in use by another process \(process {os.getpid()}\)", message)
        lock.release()
        assert main(["train", "--resume", "run", "--sac.steps", "80"]) == 0

    def test_a_bug_shows_its_traceback(self, work, tiny, monkeypatch):
        """Only mistakes of the user's are cut short."""
        monkeypatch.setattr(TinyVectorEnv, "step", lambda self, actions: [][0])
        with pytest.raises(IndexError):
            main(["train", *TINY_FLAGS, "--run-dir", "run"])
        monkeypatch.setattr(TinyVectorEnv, "step", lambda self, actions: int("x"))
        with pytest.raises(ValueError, match="invalid literal"):
            main(["train", *TINY_FLAGS, "--run-dir", "other"])

    def test_non_finite_training_ends_with_exit_code_1_and_one_line_or_goes_on_when_asked(self, work, tiny, capsys):
        """Adam's step of 1e38 overflows the first losses after it."""
        flags = ["train", *TINY_FLAGS, "--sac.critic-lr", "1e38"]
        assert main([*flags, "--run-dir", "run"]) == 1
        said = capsys.readouterr().err
        assert re.fullmatch(r"mtrl-imgrad: non-finite losses.*(critic|actor) loss of (east|north): \d+.*\n", said)
        assert main([*flags, "--run-dir", "other", "--sac.nan-policy", "skip"]) == 0
        assert "warning: non-finite losses" in capsys.readouterr().out

    def test_a_transition_that_is_not_finite_ends_it_with_exit_code_1_and_one_line_or_is_left_out(
        self, work, tiny, monkeypatch, capsys
    ):
        def spoil(env, rewards, final_obs):
            rewards[1] = np.nan if env.steps_taken == 7 else rewards[1]

        monkeypatch.setattr(TinyVectorEnv, "spoil", spoil)
        flags = ["train", *TINY_FLAGS]
        assert main([*flags, "--run-dir", "run"]) == 1
        said = capsys.readouterr().err
        assert re.fullmatch(
            r"mtrl-imgrad: north, environment 0, goal \d+, step \d+: the reward is nan\. .*skip.*\n", said
        )
        assert main([*flags, "--run-dir", "other", "--sac.nan-policy", "skip"]) == 0
        assert "warning: transitions left out: 1 (north" in capsys.readouterr().out


class TestPrecedence:
    def write(self, folder: Path, name: str, plain: dict) -> str:
        (folder / name).write_text(yaml.safe_dump(plain))
        return name

    def test_later_configurations_win_field_by_field(self, work):
        first = self.write(work, "first.yaml", {"seed": 5, "sac": {"steps": 10, "warmup": 3}})
        second = self.write(work, "second.yaml", {"sac": {"steps": 20}})
        config = parse_config(["--config", first, "--config", second])
        assert (config.seed, config.sac.steps, config.sac.warmup) == (5, 20, 3)
        assert parse_config(["--config", second, "--config", first]).sac.steps == 10

    def test_flags_win_over_configurations_wherever_they_stand(self, work):
        name = self.write(work, "first.yaml", {"sac": {"steps": 10}})
        for arguments in (["--sac.steps", "30", "--config", name], ["--config", name, "--sac.steps=30"]):
            assert parse_config(arguments).sac.steps == 30

    def test_later_flags_win(self):
        assert parse_config(["--seed", "3", "--seed", "4"]).seed == 4

    def test_another_aggregator_replaces_the_former_with_its_fields(self, work):
        name = self.write(work, "first.yaml", {"aggregator": {"name": "cagrad", "c": 0.75}})
        assert parse_config(["--config", name]).aggregator == CAGrad(c=0.75)
        assert parse_config(["--config", name, "--aggregator", "conicgrad"]).aggregator == ConicGrad()
        assert parse_config(["--config", name, "--aggregator", "mean"]).aggregator == Mean()
        assert parse_config(["--aggregator", "mean", "--config", name]).aggregator == CAGrad(c=0.75)
        assert parse_config(["--config", name, "--aggregator.c", "0.25"]).aggregator == CAGrad(c=0.25)

    def test_a_configuration_may_name_only_a_field_of_the_aggregator(self, work):
        name = self.write(work, "first.yaml", {"aggregator": {"c": 0.75}})
        assert parse_config(["--config", name]).aggregator == IMGrad(c=0.75)
        assert parse_config(["--aggregator", "cagrad", "--config", name]).aggregator == CAGrad(c=0.75)


def test_naming_the_chosen_aggregator_again_keeps_its_fields():
    assert parse_config(["--config", "mt10_cagrad", "--aggregator", "cagrad"]).aggregator == CAGrad(c=0.9)
    assert parse_config(["--aggregator", "cagrad", "--config", "mt10_cagrad"]).aggregator == CAGrad(c=0.9)


def test_an_interrupt_ends_with_one_line(capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupt)
    assert main(["train"]) == 130
    said = capsys.readouterr().err
    assert said == "mtrl-imgrad: interrupted\n"


class TestForms:
    @pytest.mark.parametrize(
        "flags",
        ["--aggregator imgrad --aggregator.c 0.7", "--aggregator=imgrad --aggregator.c=0.7", "--aggregator.c 0.7"],
    )
    def test_the_aggregator_and_its_fields(self, flags):
        assert parse_config(flags.split()).aggregator == IMGrad(c=0.7)

    @pytest.mark.parametrize("name", list(AGGREGATORS))
    def test_every_aggregator_by_name(self, name):
        assert aggregator_name(parse_config(["--aggregator", name]).aggregator) == name

    def test_a_benchmark_is_short_for_its_tasks(self):
        assert parse_config(["--benchmark", "MT50"]).benchmark.tasks == ("MT50",)
        assert parse_config(["--benchmark", "MT50", "--benchmark.goals", "3"]).benchmark.goals == 3

    def test_a_list_of_tasks(self):
        for flags in ("", "--benchmark MT50", "--config mt50"):
            tasks = parse_config([*flags.split(), "--benchmark.tasks", "reach-v3", "push-v3"]).benchmark.tasks
            assert tasks == ("reach-v3", "push-v3")

    @pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
    def test_booleans(self, work, word, value):
        assert parse_config(["--network.share-encoder", word]).network.share_encoder is value
        assert parse_config([f"--network.share-encoder={word}"]).network.share_encoder is value
        (work / "own.yaml").write_text(f"network: {{share_encoder: {word}}}")
        assert parse_config(["--config", "own.yaml"]).network.share_encoder is value

    def test_null_in_yaml_is_none(self, work):
        (work / "own.yaml").write_text("envs: {goal_seed: null}")
        assert parse_config(["--config", "own.yaml"]).envs.goal_seed is None
        assert parse_config(["--envs.goal-seed", "3", "--envs.goal-seed", "None"]).envs.goal_seed is None
        (work / "seeded.yaml").write_text("envs: {goal_seed: 3}")
        assert parse_config(["--config", "seeded.yaml"]).envs.goal_seed == 3
        assert parse_config(["--config", "seeded.yaml", "--config", "own.yaml"]).envs.goal_seed is None

    @pytest.mark.parametrize("number", ["3e-4", "3.0e-4", "0.0003"])
    def test_numbers_with_exponents(self, work, number):
        """YAML reads 3e-4 as text; the command line does not."""
        (work / "own.yaml").write_text(f"sac: {{actor_lr: {number}}}")
        assert parse_config(["--config", "own.yaml"]).sac.actor_lr == 3e-4
        assert parse_config(["--sac.actor-lr", number]).sac.actor_lr == 3e-4

    def test_underscores_in_numbers_and_negative_numbers(self, work):
        (work / "own.yaml").write_text("sac: {steps: 40_000, target_entropy: -2.5}")
        sac = parse_config(["--config", "own.yaml"]).sac
        assert (sac.steps, sac.target_entropy) == (40_000, -2.5)
        assert parse_config(["--sac.target-entropy", "-2.5"]).sac.target_entropy == -2.5

    @pytest.mark.parametrize("name", ["--sac.batch-per-task", "--sac.batch_per_task"])
    def test_hyphens_and_underscores(self, name):
        assert parse_config([name, "7"]).sac.batch_per_task == 7

    def test_an_empty_run_folder_and_one_with_blanks(self, work):
        (work / "own.yaml").write_text("run_dir: ''")
        assert parse_config(["--config", "own.yaml"]).run_dir == ""
        assert parse_config(["--run-dir", "some where/run"]).run_dir == "some where/run"

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_a_shipped_configuration_by_name_and_by_path(self, path):
        by_name, by_file_name = parse_config(["--config", path.stem]), parse_config(["--config", path.name])
        assert to_dict(by_name) == to_dict(by_file_name) == to_dict(parse_config(["--config", str(path)]))

    def test_no_arguments_are_the_defaults(self):
        assert to_dict(parse_config([])) == to_dict(Config())


class TestTraining:
    def test_the_command_line_trains_and_goes_on(self, work, tiny, capsys, read_progress):
        assert main(["train", *TINY_FLAGS]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert "run folder: runs/2tasks-mean-s1\n" in said.out
        assert main(["train", *TINY_FLAGS, "--sac.steps", "80", "--run-dir", "straight"]) == 0
        assert main(["train", "--resume", "runs/2tasks-mean-s1", "--sac.steps", "80"]) == 0
        assert "going on from step 40" in capsys.readouterr().out
        folder = Path("runs/2tasks-mean-s1")
        assert read_progress(folder) == read_progress(Path("straight"))
        assert len((folder / "command.txt").read_text().splitlines()) == 2
        assert yaml.safe_load((folder / "config.yaml").read_text())["sac"]["steps"] == 80

    def test_a_baseline_trains_goes_on_and_stays_what_it_is(self, work, tiny, capsys, read_progress):
        """A configuration may speak of other algorithms, too; only a flag may not."""
        sections = {"network": {"width": 8}, "sac": {"batch_per_task": 8}, "sb3": {"net_arch": [8], "batch_size": 8}}
        (work / "both.yaml").write_text(yaml.safe_dump(sections))
        unused = ("--aggregator", "--network", "--sac.batch-per-task", "--compile")
        groups = re.findall(r"--\S+[^-]*", TINY_COMMAND.replace("\n", " "))
        flags = " ".join(group for group in groups if not group.startswith(unused)).split()
        flags = ["--config", "both.yaml", "--algorithm", "sb3-sac", *flags]
        assert main(["train", *flags]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert "run folder: runs/2tasks-sb3-sac-s1\n" in said.out
        assert main(["train", *flags, "--sac.steps", "80", "--run-dir", "straight"]) == 0
        assert main(["train", "--resume", "runs/2tasks-sb3-sac-s1", "--sac.steps", "80"]) == 0
        assert "going on from step 40" in capsys.readouterr().out
        assert read_progress(Path("runs/2tasks-sb3-sac-s1")) == read_progress(Path("straight"))
        message = fails(capsys, "train", "--resume", "straight", "--algorithm", "sb3-sac-blind")
        assert "algorithm: the run has 'sb3-sac', and a resumed run cannot change it" in message

    def test_a_finished_run_may_be_resumed_with_nothing_to_do(self, work, tiny, capsys):
        assert main(["train", *TINY_FLAGS, "--run-dir", "run"]) == 0
        assert main(["train", "--resume", "run"]) == 0
        assert capsys.readouterr().err == ""

    def test_a_users_aggregator_from_the_working_directory_trains(self, work, tiny, read_csv):
        flags = [*TINY_FLAGS, "--aggregator", "my_rules:InverseNorm", "--aggregator.power", "2.0", "--run-dir", "run"]
        assert main(["train", *flags]) == 0
        plain = yaml.safe_load((work / "run" / "config.yaml").read_text())
        assert plain["aggregator"] == {"name": "my_rules:InverseNorm", "power": 2.0}
        last = read_csv(work / "run" / "progress.csv")[-1]
        weights = [float(last[f"gradients/critic/weight/{task}"]) for task in ("east", "north")]
        assert sum(weights) == pytest.approx(1)
        assert main(["train", "--resume", "run"]) == 0

    def test_a_users_aggregator_is_parsed_with_its_fields(self, work):
        rule = parse_config(["--aggregator", "my_rules:InverseNorm", "--aggregator.power", "0.5"]).aggregator
        assert (aggregator_name(rule), rule.power) == ("my_rules:InverseNorm", 0.5)  # pyright: ignore


def squashed(text: str) -> str:
    """Without blanks, line breaks and boxes, so that the width of a terminal does not matter."""
    return re.sub(r"[\s│╭╮╰╯─]|\x1b\[[0-9;]*m", "", text)


def help_entries(text: str) -> dict[str, str]:
    """Flag -> what the boxes of a help text say of it, squashed."""
    starts = [*re.finditer(r"^│ (--[\w.-]+)", text, flags=re.MULTILINE)]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return {start[1]: squashed(text[start.start() : end]) for start, end in zip(starts, ends, strict=True)}


def field_sentences() -> dict[str, tuple[str, object]]:
    """Flag -> sentence and default, read from the source of the configuration rather than from the parser."""
    sources = [Path(module.__file__ or "").read_text() for module in (config_module, config_sections)]
    nodes = [node for source in sources for node in ast.parse(source).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def sentences(name: str) -> dict[str, str]:
        body = classes[name].body
        return {
            node.target.id: str(after.value.value)
            for node, after in itertools.pairwise(body)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        }

    found = {}
    for prefix, kind in [("", Config), *((f"{f.name}.", type(getattr(Config(), f.name))) for f in sections())]:
        explained = sentences(kind.__name__)
        for field in dataclasses.fields(kind):
            if prefix or not dataclasses.is_dataclass(getattr(Config(), field.name)):
                flag = f"--{prefix}{field.name}".replace("_", "-")
                found[flag] = explained[field.name], getattr(kind(), field.name)
    return found


def sections() -> list[dataclasses.Field]:
    own = [f for f in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config(), f.name))]
    return [field for field in own if field.name != "aggregator"]


class TestHelp:
    @pytest.fixture(scope="class")
    @classmethod
    def text(cls) -> str:
        command = [sys.executable, "-m", "mtrl_imgrad", "train", "--help"]
        env = {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout

    @pytest.mark.parametrize("flag", field_sentences())
    def test_every_field_has_its_sentence_and_default(self, text, flag):
        sentence, default = field_sentences()[flag]
        assert sentence[0].isalnum()
        assert sentence.endswith((".", ")."))
        words = map(str, default) if isinstance(default, tuple) else [repr(default) if default == "" else str(default)]
        shown = " ".join(words)
        entry = help_entries(text)[flag]
        assert squashed(f"{sentence} (default: {shown})") in entry

    def test_every_field_is_a_flag(self, text):
        rule = [f"--aggregator.{f.name}" for f in dataclasses.fields(IMGrad)]
        assert set(help_entries(text)) == {*field_sentences(), *(flag.replace("_", "-") for flag in rule)}

    def test_the_fields_of_the_chosen_aggregator_are_shown(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--aggregator", "pcgrad", "--help"])
        assert stop.value.code == 0
        assert "--aggregator.variant" not in capsys.readouterr().out

    @pytest.mark.parametrize("command", ["train", "evaluate", "list"])
    def test_every_command_has_help(self, capsys, command):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: mtrl-imgrad {command}" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "long", "short"])
    def test_the_program_shows_its_commands(self, capsys, monkeypatch, arguments):
        monkeypatch.setattr(sys, "argv", ["mtrl-imgrad", *arguments])
        assert main() == 0
        said = capsys.readouterr().out
        assert all(command in said for command in ("train", "evaluate", "list"))

    def test_field_names_are_those_of_a_configuration(self):
        def dotted(plain, prefix=""):
            for key, value in plain.items():
                yield from dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

        assert {*field_names(Config), "aggregator.name"} == set(dotted(to_dict(Config())))


class TestList:
    def test_tasks(self, capsys):
        from mtrl_imgrad.envs import MT10, MT50

        assert main(["list", "tasks"]) == 0
        lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
        assert tuple(lines["MT10"].split()) == MT10
        assert tuple(lines["MT50"].split()) == MT50

    def test_aggregators_with_their_facts_one_a_line(self, capsys):
        assert main(["list", "aggregators"]) == 0
        title, *lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(AGGREGATORS)
        starts = [title.index(column) for column in COLUMNS]
        assert all(line[start - 1] == " " != line[start] for line in lines for start in starts[1:])
        imgrad = next(line for line in lines if line.startswith("imgrad "))
        cells = [imgrad[start:end].strip() for start, end in itertools.pairwise([*starts, None])]
        assert cells[:4] == ["imgrad", "Zhou et al. 2025, arXiv 2503.08006", "Gramian", "-"]
        assert cells[4].startswith("c=0.4, variant=official")
        assert cells[5].startswith("IMGrad: CAGrad whose two terms are weighed by the imbalance")

    def test_configurations_with_their_first_line(self, capsys):
        assert main(["list", "configs"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [path.stem for path in CONFIGS]
        for line, path in zip(lines, CONFIGS, strict=True):
            assert path.read_text().splitlines()[0].removeprefix("# ") in line


def test_python_and_the_command_line_are_the_same_program(work, tiny, read_progress):
    assert main(["train", *TINY_FLAGS, "--run-dir", "command"]) == 0
    config = tiny_config(
        "python",
        threads=0,
        benchmark=dataclasses.replace(Config().benchmark, tasks=("east", "north"), goals=4),
        aggregator=Mean(),
        network=NetworkConfig(width=8, depth=2),
        sac=dataclasses.replace(Config().sac, steps=40, warmup=20, batch_per_task=8),
        eval=EvalConfig(every=0, horizon=10),
        log=LogConfig(every=20, tensorboard=False),
    )
    train(config, make_world=make_world)
    assert read_progress(Path("command")) == read_progress(Path("python"))
