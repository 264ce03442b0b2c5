"""The built wheel, installed outside the checkout, trains and evaluates on Meta-World."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = """
    train --config quickstart --benchmark.tasks reach-v3 drawer-close-v3 --benchmark.goals 2 --run-dir run --device cpu
    --envs.horizon 20 --eval.horizon 20 --eval.every 0 --sac.steps 80 --sac.warmup 40 --log.every 40"""
USE = """
import numpy
import mtrl_imgrad
from mtrl_imgrad.cli import main

assert main(["evaluate", "run"]) == 0
policy = mtrl_imgrad.load("run").policy("drawer-close-v3")
action, state = policy.predict(numpy.zeros(39), deterministic=True)
print("action", action.shape, state)
print("from", mtrl_imgrad.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "build", "*.egg-info")
    shutil.copytree(ROOT, source, dirs_exist_ok=True, ignore=leave_out)
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", built, source, folder=source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, folder=folder)
    return folder


def run(*arguments: object, folder: Path, python_path: Path | None = None) -> str:
    """Runs Python in a folder and returns what it printed; anything on stderr of the package's commands is an error."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    if python_path:
        environment["PYTHONPATH"] = str(python_path)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if python_path:
        assert done.stderr == ""
    return done.stdout


def test_it_has_the_package_the_configurations_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    ours = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mtrl_imgrad").rglob("*.py")}
    configs = {f"mtrl_imgrad/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert ours == modules | configs | {"mtrl_imgrad/py.typed"}
    assert "mtrl-imgrad = mtrl_imgrad.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_finds_its_configurations_outside_the_checkout(installed, tmp_path):
    listed = run("-m", "mtrl_imgrad", "list", "configs", folder=tmp_path, python_path=installed)
    assert [line.split()[0] for line in listed.splitlines()] == sorted(
        p.stem for p in (ROOT / "configs").glob("*.yaml")
    )


def test_it_trains_and_evaluates_two_tasks_of_meta_world(installed, tmp_path):
    said = run("-m", "mtrl_imgrad", *TRAIN.split(), folder=tmp_path, python_path=installed)
    assert "tasks: reach-v3, drawer-close-v3\n" in said
    with (tmp_path / "run" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["40", "80"]
    assert float(rows[-1]["train/updates"]) == 10  # 80 - 40 steps, in vector steps of 4
    trained = (tmp_path / "run" / "eval.csv").read_bytes()
    assert len(trained.splitlines()) == 1 + 2 * 2

    said = run("-c", USE, folder=tmp_path, python_path=installed)
    assert "action (4,) None\n" in said
    assert f"from {installed / 'mtrl_imgrad' / '__init__.py'}\n" in said
    assert "mean over tasks" in said
    assert (tmp_path / "run" / "eval.csv").read_bytes() == trained
