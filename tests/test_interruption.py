"""However a training process ends, `--resume` goes on, and the numbers are those of a run that was left alone."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from run_folders import without_times

from mtrl_imgrad.files import is_locked
from mtrl_imgrad.interruption import Interruption, Stopped

TRAIN = (sys.executable, str(Path(__file__).parent / "tiny_program.py"), "train")
COMMON = """
    --benchmark.tasks east north --benchmark.goals 4 --device cpu --threads 1 --envs.horizon 10 --eval.horizon 10
    --eval.every 30 --eval.goals-per-task 2 --sac.steps 120 --sac.warmup 20 --log.every 7 --log.tensorboard False
    --checkpoint.every 13"""
OURS = f"{COMMON} --network.width 8 --network.depth 2 --sac.batch-per-task 8 --compile False --aggregator famo"
BASELINE = f"{COMMON} --algorithm sb3-sac --sb3.batch-size 16"


def start(*arguments: str, pause: float = 0.0) -> subprocess.Popen[str]:
    environment = os.environ | {"TINY_PAUSE": str(pause)}
    return subprocess.Popen(
        [*TRAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(*arguments: str) -> None:
    with start(*arguments) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def wait_for_rows(progress: Path, rows: int) -> None:
    deadline = time.monotonic() + 120
    while not progress.exists() or len(progress.read_text().splitlines()) <= rows:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def numbers(run: Path) -> list[bytes]:
    return [without_times(run / "progress.csv"), *(path.read_bytes() for path in sorted(run.glob("eval*.csv")))]


class TestSignals:
    @pytest.mark.parametrize("flags", [OURS, BASELINE], ids=["mtsac", "sb3-sac"])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_saves_ends_with_128_plus_the_signal_and_goes_on_with_the_same_numbers(self, tmp_path, flags, number):
        finish(*flags.split(), "--run-dir", str(tmp_path / "whole"))
        run = tmp_path / "run"
        with start(*flags.split(), "--run-dir", str(run), pause=0.05) as process:
            wait_for_rows(run / "progress.csv", 4)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert said.strip().splitlines()[-1] == f"mtrl-imgrad: stopped; go on with --resume {run}"
        saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
        assert saved >= 28, "it saved where it was, not only when a checkpoint was due"
        assert not (run / "eval.csv").exists()
        finish("--resume", str(run))
        assert numbers(run) == numbers(tmp_path / "whole")

    def test_a_second_signal_does_not_wait(self):
        interruption = Interruption()
        interruption.nothing_to_lose = False
        with interruption.by_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.number == signal.SIGTERM
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGINT)

    def test_where_nothing_can_be_lost_the_first_one_ends_it(self):
        interruption = Interruption()
        with interruption.by_signals(), pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.number == signal.SIGTERM

    def test_afterwards_signals_are_what_they_were(self):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with Interruption().by_signals():
            assert signal.getsignal(signal.SIGINT) != before[0]
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class TestKilled:
    """kill -9 at any moment, also inside of a checkpoint."""

    def kill_and_finish(self, tmp_path: Path, kills: int, steps: int) -> None:
        flags = [*OURS.split(), "--sac.steps", str(steps)]
        finish(*flags, "--run-dir", str(tmp_path / "whole"))
        run, generator = tmp_path / "run", random.Random(1)
        for number in range(kills):
            going_on = (
                ["--resume", str(run)] if (run / "config.yaml").exists() else [*OURS.split(), "--run-dir", str(run)]
            )
            before = self.newest(run)
            with start(*going_on, pause=0.2) as process:
                while not is_locked(run) and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(generator.uniform(0.0, 4.0))
                children = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.communicate()
            assert process.returncode == -signal.SIGKILL, f"kill {number} came too late"
            assert self.newest(run) >= before, "what was saved stays"
            assert not is_locked(run)
            _, alive = psutil.wait_procs(children, timeout=10)
            assert not alive
            for path in run.glob("*.csv"):
                with path.open(newline="") as file:
                    header, *rows = list(csv.reader(file))
                assert all(len(row) == len(header) for row in rows), path
        finish("--resume", str(run))
        assert numbers(run) == numbers(tmp_path / "whole")

    def newest(self, run: Path) -> int:
        return max((int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()), default=0)

    def test_twice(self, tmp_path):
        self.kill_and_finish(tmp_path, kills=2, steps=120)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_thirty_times(self, tmp_path):
        self.kill_and_finish(tmp_path, kills=30, steps=900)
