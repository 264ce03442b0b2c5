"""However a training process ends, `--resume` goes on, and the numbers are those of a run that was left alone."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from run_folders import without_times

from mtrl_imgrad.files import is_locked
from mtrl_imgrad.interruption import Interruption, Stopped

TRAIN = (sys.executable, str(Path(__file__).parent / "tiny_program.py"), "train")
CHECKPOINT_EVERY = 13
COMMON = f"""
    --benchmark.tasks east north --benchmark.goals 4 --device cpu --threads 1 --envs.horizon 10 --eval.horizon 10
    --eval.every 30 --eval.goals-per-task 2 --sac.steps 120 --sac.warmup 20 --log.every 7 --log.tensorboard False
    --checkpoint.every {CHECKPOINT_EVERY}"""
OURS = f"{COMMON} --network.width 8 --network.depth 2 --sac.batch-per-task 8 --compile False --aggregator famo"
BASELINE = f"{COMMON} --algorithm sb3-sac --sb3.batch-size 16"
METAWORLD = """
    --benchmark.tasks reach-v3 push-v3 --benchmark.goals 3 --device cpu --threads 1 --envs.workers 2 --envs.horizon 20
    --envs.pipeline True --envs.self-check off --eval.every 0 --eval.final False --sac.warmup 10 --sac.batch-per-task 8
    --network.width 8 --network.depth 2 --compile False --log.every 10 --log.tensorboard False
    --checkpoint.every 10"""


def start(*arguments: str, pause: float = 0.0, disk_pause: float = 0.0) -> subprocess.Popen[str]:
    environment = os.environ | {"TINY_PAUSE": str(pause), "TINY_DISK_PAUSE": str(disk_pause)}
    return subprocess.Popen(
        [*TRAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(*arguments: str) -> None:
    with start(*arguments) as process:
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_rows(progress: Path, rows: int) -> None:
    wait_until(lambda: progress.exists() and len(progress.read_text().splitlines()) > rows)


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

    def test_a_closed_terminal_asks_too_but_not_under_nohup(self):
        interruption = Interruption()
        interruption.nothing_to_lose = False
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, too
        try:
            with interruption.by_signals():
                os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.number == signal.SIGHUP
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with Interruption().by_signals():
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_without_a_replay_it_does_not_say_that_the_run_can_go_on(self, tmp_path):
        run = tmp_path / "run"
        with start(*OURS.split(), "--checkpoint.replay", "False", "--run-dir", str(run), pause=0.05) as process:
            wait_for_rows(run / "progress.csv", 4)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 143
        assert "stopped; without the replay (checkpoint.replay False) it cannot go on" in said

    def test_who_stops_reading_the_output_does_not_end_the_run(self, tmp_path):
        run = tmp_path / "run"
        with start(*OURS.split(), "--run-dir", str(run), pause=0.02) as process:
            assert process.stdout
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr
            said = process.stderr.read()
        assert process.returncode == 0, said
        assert said == ""
        assert (run / "eval.csv").exists()

    def test_afterwards_signals_are_what_they_were(self):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with Interruption().by_signals():
            assert signal.getsignal(signal.SIGINT) != before[0]
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class TestKilled:
    """kill -9 at any moment, every other time inside of a checkpoint that is being written."""

    def kill_and_finish(self, tmp_path: Path, kills: int, steps: int) -> int:
        """How many of the kills fell inside of a checkpoint."""
        flags, run, generator = [*OURS.split(), "--sac.steps", str(steps)], tmp_path / "run", random.Random(1)
        shared_before = shared_memory()
        inside = sum(self.kill(run, flags, generator, while_saving=number % 2 == 1) for number in range(kills))
        finish("--resume", str(run))
        finish(*flags, "--run-dir", str(tmp_path / "whole"))
        assert numbers(run) == numbers(tmp_path / "whole")
        assert not [*run.rglob("*.tmp"), *run.rglob("*.old")], "what a killed process left is removed"
        assert shared_memory() <= shared_before
        return inside

    def kill(self, run: Path, flags: Sequence[str], generator: random.Random, while_saving: bool) -> bool:
        """Start or resume the run and kill it; whether that was inside of a checkpoint."""
        going_on = ["--resume", str(run)] if (run / "config.yaml").exists() else [*flags, "--run-dir", str(run)]
        saved_before, left_before = newest_saved(run), unfinished(run)
        with start(*going_on, pause=0.05, disk_pause=0.02) as process:
            wait_until(lambda: is_locked(run) or process.poll() is not None)
            time.sleep(generator.uniform(0.0, 4.0))
            if while_saving:
                wait_until(lambda: unfinished(run) - left_before or process.poll() is not None)
                time.sleep(generator.uniform(0.0, 0.2))
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            _, said = process.communicate()
        assert (process.returncode, said) == (-signal.SIGKILL, ""), "the kill came too late"
        assert newest_saved(run) >= saved_before, "what was saved stays"
        assert last_row(run) - newest_saved(run) <= CHECKPOINT_EVERY, "more is lost than one interval"
        assert not is_locked(run)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        for path in run.glob("*.csv"):
            header, *rows = csv_rows(path)
            assert all(len(row) == len(header) for row in rows), path
        return bool(unfinished(run) - left_before)

    def test_twice(self, tmp_path):
        assert self.kill_and_finish(tmp_path, kills=2, steps=200) >= 1

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_thirty_times(self, tmp_path):
        assert self.kill_and_finish(tmp_path, kills=30, steps=2000) >= 5

    def test_with_the_main_process_the_workers_of_metaworld_end_and_the_run_goes_on(self, tmp_path):
        run, shared_before = tmp_path / "run", shared_memory()
        command = [sys.executable, "-m", "mtrl_imgrad", "train"]
        with subprocess.Popen([*command, *METAWORLD.split(), "--run-dir", run], stdout=subprocess.DEVNULL) as process:
            wait_until(lambda: newest_saved(run) or process.poll() is not None)
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert len(workers) == 2
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        assert shared_memory() <= shared_before
        assert not is_locked(run)
        going_on = ["--resume", run, "--sac.steps", str(newest_saved(run) + 20)]
        subprocess.run([*command, *going_on], check=True, stdout=subprocess.DEVNULL, timeout=300)
        assert last_row(run) == newest_saved(run)


def newest_saved(run: Path) -> int:
    return max((int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()), default=0)


def unfinished(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written or replaced, or that a killed process left so, with their times."""
    found = set()
    for path in run.glob("checkpoints/*"):
        with contextlib.suppress(FileNotFoundError):  # it was finished in between
            found |= {(path.name, path.stat().st_mtime_ns)} if path.suffix in (".tmp", ".old") else set()
    return found


def csv_rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def last_row(run: Path) -> int:
    """The last step of which progress.csv tells."""
    rows = csv_rows(run / "progress.csv")[1:] if (run / "progress.csv").exists() else []
    return int(rows[-1][0]) if rows else 0


def shared_memory() -> set[str]:
    """Names of shared memory, where the system shows them."""
    place = Path("/dev/shm")
    return {path.name for path in place.iterdir()} if place.is_dir() else set()
