"""A full disk costs what could not be written and nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint import BLOCKS, names, save, value_of
from test_kept_checkpoints import short_config
from tiny_world import make_world

from mtrl_imgrad import cli, train
from mtrl_imgrad.checkpoint import verify
from mtrl_imgrad.config import CheckpointConfig
from mtrl_imgrad.files import append_whole, write_whole
from mtrl_imgrad.kept_checkpoints import choose_checkpoint

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["mtrl-imgrad", *sys.argv[2:]]
runpy.run_path("tiny_program.py", run_name="__main__")
"""


def limited(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that cannot make a file of more bytes."""
    command = [sys.executable, "-c", LIMITED, str(size), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)


def fail(*args, **kwargs):
    raise FULL


class TestFiles:
    @contextlib.contextmanager
    def limit(self):
        """While files may have 1000 bytes. No longer: pytest writes to a file too where its output goes to one."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_a_row_is_written_or_not(self, tmp_path):
        path = tmp_path / "rows.csv"
        append_whole(path, "a" * 899 + "\n")
        with self.limit(), pytest.raises(OSError, match=r"File too large: .*rows\.csv"):
            append_whole(path, "b" * 199 + "\n")  # the limit lets a part of it through
        assert path.read_text() == "a" * 899 + "\n"
        append_whole(path, "c\n")
        assert path.read_text().endswith("a\nc\n")

    def test_a_whole_file_stays_as_it_was_with_nothing_beside_it(self, tmp_path):
        write_whole(tmp_path / "a.json", "old")
        with self.limit(), pytest.raises(OSError, match=r"File too large: .*a\.json"):
            write_whole(tmp_path / "a.json", "n" * 2000)
        assert (tmp_path / "a.json").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


class TestCheckpoints:
    @pytest.mark.parametrize("step", [10, 20], ids=["the same step", "a later step"])
    @pytest.mark.parametrize("moment", ["_write", "_write_manifest", "sync", "os.replace"])
    def test_the_previous_one_is_intact_and_nothing_is_left(self, tmp_path, monkeypatch, moment, step):
        base = save(tmp_path, 10, 1.0)
        with monkeypatch.context() as patched:
            patched.setattr(f"mtrl_imgrad.checkpoint.{moment}", fail)
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, step, 2.0, BLOCKS, base)
        assert names(tmp_path) == ["0000000010"]
        verify(choose_checkpoint(tmp_path))
        assert value_of(tmp_path) == 1.0

    def test_training_goes_on_says_so_and_saves_at_the_next_interval(
        self, tmp_path, monkeypatch, capsys, read_progress
    ):
        """The disk is full while the checkpoint of step 60 is written, and only then."""
        straight = train(short_config(tmp_path / "straight"), make_world=make_world)
        capsys.readouterr()
        write = monkeypatch.setattr

        from mtrl_imgrad import checkpoint

        original = checkpoint._write
        write(checkpoint, "_write", lambda path, x: fail() if "0000000060" in str(path) else original(path, x))
        folder = train(short_config(tmp_path / "run"), make_world=make_world)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "could not be saved" in line]
        assert line == (
            "warning: the checkpoint of step 60 could not be saved (No space left on device); "
            "that of step 30 stays, and training goes on"
        )
        assert read_progress(folder) == read_progress(straight)
        assert [name for name in names(folder) if name != "best"] == ["0000000090", "0000000120"]
        verify(choose_checkpoint(folder, resume=True))

    def test_a_bug_is_not_taken_for_a_full_disk(self, tmp_path, monkeypatch):
        def bug(*args, **kwargs):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory")

        monkeypatch.setattr("mtrl_imgrad.checkpoint._write", bug)
        with pytest.raises(NotADirectoryError):
            train(short_config(tmp_path / "run", checkpoint=CheckpointConfig(every=30)), make_world=make_world)


class TestCommands:
    FLAGS = (
        *("--benchmark.tasks", "east", "north", "--benchmark.goals", "10", "--envs.horizon", "10", "--threads", "1"),
        *("--device", "cpu", "--compile", "False", "--aggregator", "mean", "--network.width", "8"),
        *("--network.depth", "1", "--sac.warmup", "20", "--sac.batch-per-task", "8", "--eval.every", "0"),
        *("--eval.horizon", "10", "--log.every", "20", "--log.tensorboard", "False", "--checkpoint.every", "40"),
    )

    def test_a_last_checkpoint_that_cannot_be_saved_ends_the_run_with_one_line_and_it_can_go_on(self, tmp_path):
        """The limit is below the size of the networks, so no checkpoint can be saved; the rows fit."""
        run, flags = str(tmp_path / "run"), (*self.FLAGS, "--sac.steps", "60")
        done = limited(15_000, "train", *flags, "--run-dir", run)
        assert done.returncode == 1, done.stderr
        assert "warning: the checkpoint of step 40 could not be saved (File too large); there is none" in done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("mtrl-imgrad: ")
        assert "could not be written (File too large)" in line
        assert limited(2**30, "train", "--resume", run).returncode == 0
        assert (tmp_path / "run" / "eval.csv").exists()

    def test_rows_that_cannot_be_written_end_the_run_with_one_line_and_it_can_go_on(self, tmp_path, read_progress):
        """The limit lies in the middle of a row of progress.csv."""
        straight, run = str(tmp_path / "straight"), str(tmp_path / "run")
        whole, part = (*self.FLAGS, "--sac.steps", "400"), (*self.FLAGS, "--sac.steps", "100")
        assert limited(2**30, "train", *whole, "--run-dir", straight).returncode == 0
        assert limited(2**30, "train", *part, "--run-dir", run).returncode == 0
        size = (tmp_path / "run" / "progress.csv").stat().st_size
        done = limited(size + 10, "train", "--resume", run, "--sac.steps", "400", "--checkpoint.every", "0")
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert "progress.csv could not be written (File too large)" in line
        assert (tmp_path / "run" / "progress.csv").read_bytes().endswith(b"\n")
        assert limited(2**30, "train", "--resume", run, "--sac.steps", "400").returncode == 0
        assert read_progress(tmp_path / "run")[-1] == read_progress(tmp_path / "straight")[-1]

    def test_tensorboard_events_that_cannot_be_written_end_the_run_with_one_line_and_it_can_go_on(self, tmp_path):
        """The limit is above the size of every other file."""
        run = str(tmp_path / "run")
        flags = (*self.FLAGS, "--eval.every", "20", "--sac.steps", "400", "--log.tensorboard", "True")
        done = limited(80_000, "train", *flags, "--run-dir", run)
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"{run}/tensorboard could not be written (File too large)" in line
        assert limited(2**30, "train", "--resume", run).returncode == 0
        assert (tmp_path / "run" / "eval.csv").exists()

    def test_a_report_that_cannot_be_written_is_told_in_one_line(self, tmp_path, monkeypatch, capsys):
        folder = train(short_config(tmp_path / "run"), make_world=make_world)
        monkeypatch.setattr("pathlib.Path.write_bytes", fail)
        assert cli.main(["report", str(folder), "--out", str(tmp_path / "report")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mtrl-imgrad: ")
        assert "No space left on device" in line
