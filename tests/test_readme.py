"""Every command and snippet of the README does what it says. The two set-up commands are run by CI itself."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from mtrl_imgrad import cli, overlays
from mtrl_imgrad.agent import Agent
from mtrl_imgrad.bench.command import bench_options
from mtrl_imgrad.comparison.command import planned
from mtrl_imgrad.record import RecordOptions
from mtrl_imgrad.report.command import ReportOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:<!-- (?P<marker>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", README, re.DOTALL)
SHORT = ["--sac.steps", "400", "--sac.warmup", "200", "--benchmark.goals", "1", "--eval.every", "0"]
"""Flags that make a README run take seconds; they come last, so they win."""
SET_UP = {"pip", "tensorboard", "bash"}
"""Commands that belong to other programs; `pip` and `pytest` are run by CI."""


def blocks(language: str) -> list[str]:
    return [text for _, found, text in BLOCKS if found == language]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs start in an empty folder and end after a few updates."""
    parse = overlays.parse_config
    for module in (cli, overlays):  # what commands call, and what the text imports
        monkeypatch.setattr(module, "parse_config", lambda arguments, base=None: parse([*arguments, *SHORT], base))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    return tmp_path


def test_every_command_of_ours_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    (tmp_path / "my_rules.py").write_text(next(text for marker, _, text in BLOCKS if marker == "my_rules.py"))
    checked = 0
    for program, *arguments in commands():
        if program == "pytest" or program in SET_UP:
            continue
        if program == "python":
            script, *rest = arguments
            importlib.import_module(Path(script).stem).parser().parse_args(rest)
            continue
        assert program == "mtrl-imgrad", f"no test knows how to check {program!r}"
        command, *rest = arguments
        if command == "train":
            _, rest = cli.take_options(rest, ("resume",))
            cli.parse_config(rest)
        elif command == "compare":
            assert planned(rest)[1]
        else:
            options = {
                "evaluate": cli.EvaluateOptions,
                "record": RecordOptions,
                "report": ReportOptions,
                "list": cli.ListOptions,
            }
            bench_options(rest) if command == "bench" else cli.parse(options[command], rest, command)
        checked += 1
    assert checked >= 8


def test_commands_that_the_text_names_exist():
    named = set(re.findall(r"`mtrl-imgrad (\w+)", README))
    assert named <= set(cli.COMMANDS)
    assert named


def test_the_quick_start_and_the_tests_are_one_command_each():
    marked = {marker: text.strip().splitlines() for marker, _, text in BLOCKS if marker.startswith("install-and")}
    assert set(marked) == {"install-and-quickstart", "install-and-test"}
    assert all(len(lines) == 1 and "-c constraints.txt" in lines[0] for lines in marked.values())


def test_training_and_loading_from_python(short_runs):
    source = next(text for text in blocks("python") if "mtrl_imgrad.load" in text)
    names: dict[str, object] = {"observation": np.zeros(39)}
    exec(source, names)
    assert isinstance(names["run"], Path)
    assert isinstance(names["agent"], Agent)
    assert names["agent"].step == 400, "the run was shortened"
    assert np.shape(names["action"]) == (4,)


def test_aggregators_on_their_own():
    names: dict = {}
    exec(next(text for text in blocks("python") if "torch.randn(10, 1000)" in text), names)
    assert names["direction"].shape == (1000,)
    assert 0 <= float(names["result"].diagnostics["cos_theta"]) <= 1


def test_the_environments_on_their_own():
    names: dict = {}
    exec(next(text for text in blocks("python") if "make_vec" in text), names)
    assert names["observations"].shape == (10, 39)
    assert names["truncated"].shape == (10,)


def test_the_aggregator_written_in_the_readme_trains(short_runs):
    text = next(text for marker, _, text in BLOCKS if marker == "my_rules.py")
    assert len(text.splitlines()) <= 30
    (short_runs / "my_rules.py").write_text(text)
    command = next(text for marker, _, text in BLOCKS if marker == "use my_rules.py")
    _, *arguments = shlex.split(command)
    assert cli.main(arguments) == 0
    (run,) = (short_runs / "runs").iterdir()
    header = (run / "progress.csv").read_text().splitlines()[0]
    assert "gradients/critic/largest_weight" in header


def test_relative_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
