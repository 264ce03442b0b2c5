"""A comparison trains every aggregator and seed once, whatever happens to it, and says what failed."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import without_times

from mtrl_imgrad.aggregators import CAGrad, IMGrad, Mean
from mtrl_imgrad.cli import main
from mtrl_imgrad.comparison.command import planned, split
from mtrl_imgrad.comparison.estimate import Cost, measure
from mtrl_imgrad.comparison.plan import last_row, plan
from mtrl_imgrad.comparison.processes import share_of_machine, start_here
from mtrl_imgrad.comparison.sweep import Progress, run_all
from mtrl_imgrad.comparison.view import Standing, progress_view, standing, summary, time_left
from mtrl_imgrad.config import Config, EnvsConfig, to_dict
from mtrl_imgrad.files import FolderLock, is_locked
from mtrl_imgrad.parsing import UserError

TESTS = Path(__file__).parents[1]
TINY_COMMAND = """
    --benchmark.tasks east north --benchmark.goals 4 --device cpu --network.width 8 --network.depth 2
    --envs.horizon 10 --eval.horizon 10 --eval.every 20 --eval.goals-per-task 2 --sac.steps 60 --sac.warmup 20
    --sac.batch-per-task 8 --log.every 20 --log.tensorboard False --compile False --checkpoint.every 10"""
TINY = TINY_COMMAND.split()
PROGRAM = (sys.executable, str(TESTS / "tiny_program.py"))
SHARE = ("--threads", "1", "--envs.workers", "0")


def tiny_plan(out: Path, methods: tuple[str, ...] = ("mean", "imgrad"), seeds: tuple[int, ...] = (1,), *flags: str):
    return plan(methods, seeds, out, [*TINY, *flags])


def finish(runs, jobs: int = 2, show=lambda progress: None) -> Progress:
    start = functools.partial(start_here, divided=SHARE, logs=runs[0].folder.parent / "logs", program=PROGRAM)
    return run_all(runs, start, jobs, show, every=0.05)


def results(out: Path) -> dict[str, bytes]:
    """What the runs of a comparison measured."""
    names = ("eval.csv", "eval_training.csv")
    measured = {
        str(path.relative_to(out)): path.read_bytes() for name in names for path in sorted(out.glob(f"*/{name}"))
    }
    return measured | {str(path.relative_to(out)): without_times(path) for path in sorted(out.glob("*/progress.csv"))}


class TestPlan:
    def test_every_seed_of_every_method_once_and_seed_by_seed(self, tmp_path):
        runs = tiny_plan(tmp_path, ("mean", "cagrad,c=0.25"), (3, 4))
        assert [run.name for run in runs] == ["mean-s3", "cagrad,c=0.25-s3", "mean-s4", "cagrad,c=0.25-s4"]
        assert [run.config.seed for run in runs] == [3, 3, 4, 4]
        assert [run.config.aggregator for run in runs] == [Mean(), CAGrad(c=0.25)] * 2

    def test_baselines_take_their_place_with_fields_of_their_own(self, tmp_path):
        runs = tiny_plan(tmp_path, ("mean", "sb3-sac", "sb3-sac-single,gradient_steps=-1"))
        assert [run.name for run in runs] == ["mean-s1", "sb3-sac-s1", "sb3-sac-single,gradient_steps=-1-s1"]
        assert [run.config.algorithm for run in runs] == ["mtsac", "sb3-sac", "sb3-sac-single"]
        assert [run.config.sb3.gradient_steps for run in runs] == [1, 1, -1]
        assert len({(run.config.sac.steps, run.config.log.every) for run in runs}) == 1

    def test_a_flag_reaches_the_methods_that_use_it_and_one_that_none_uses_is_refused(self, tmp_path):
        runs = tiny_plan(tmp_path, ("mean", "sb3-sac"), (1,), "--network.width", "9", "--sb3.net-arch", "7", "5")
        assert [run.config.network.width for run in runs] == [9, 400]
        assert [run.config.sb3.net_arch for run in runs] == [(256, 256), (7, 5)]
        with pytest.raises(UserError, match=r"network\.width: --algorithm sb3-sac does not use this field"):
            plan(["sb3-sac"], [1], tmp_path, ["--network.width", "9"])

    def test_runs_differ_in_nothing_else(self, tmp_path):
        first, *others = tiny_plan(tmp_path, ("mean", "imgrad"), (1, 2))
        for run in others:
            same = replace(run.config, aggregator=first.config.aggregator, seed=first.config.seed)
            assert to_dict(same) == to_dict(first.config)

    def test_fields_of_an_aggregator_are_flags(self, tmp_path):
        (run,) = tiny_plan(tmp_path, ("imgrad,variant=eq9,c=0.3",))
        assert run.config.aggregator == IMGrad(variant="eq9", c=0.3)

    @pytest.mark.parametrize(
        ("methods", "message"),
        [
            (("mena",), "aggregator: .*mean"),
            (("cagrad,c",), r"aggregators: 'cagrad,c' is not allowed; it must be NAME"),
            (("cagrad,=1",), r"aggregators: 'cagrad,=1' is not allowed; it must be NAME"),
            (("cagrad,k=1",), r"aggregator\.k: there is no such field"),
            (("mean", "imgrad", "mean"), "aggregators: 'mean' and 'mean' are the same"),
            (("imgrad", "imgrad,variant=official"), "aggregators: 'imgrad' and 'imgrad,variant=official' are the same"),
        ],
    )
    def test_a_wrong_method_is_named(self, tmp_path, methods, message):
        with pytest.raises(UserError, match=message):
            tiny_plan(tmp_path, methods)

    def test_a_folder_of_another_comparison_is_refused_naming_the_difference(self, tmp_path):
        finish(tiny_plan(tmp_path, ("mean",)))
        for flags, message in (
            (("--sac.gamma", "0.5"), r"mean-s1 is a run of another comparison; sac\.gamma"),
            (("--sac.steps", "40"), r"another comparison; sac\.steps: the run has 60"),
        ):
            (run,) = tiny_plan(tmp_path, ("mean",), (1,), *flags)
            with pytest.raises(UserError, match=message):
                run.state()

    def test_cores_are_divided_and_what_the_user_says_stays(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
        assert share_of_machine(2, Config()) == ["--threads", "4", "--envs.workers", "4"]
        assert share_of_machine(8, Config()) == ["--threads", "1", "--envs.workers", "0"]
        assert share_of_machine(2, Config(threads=2)) == ["--envs.workers", "4"]
        assert share_of_machine(2, Config(envs=EnvsConfig(workers=1))) == ["--threads", "4"]
        with pytest.raises(UserError, match="jobs: 9 runs at once are more than this machine's 8 cores"):
            share_of_machine(9, Config())


class TestRuns:
    def test_all_are_trained_and_a_second_time_none(self, tmp_path):
        runs = tiny_plan(tmp_path, ("mean", "imgrad"), (1, 2))
        progress = finish(runs)
        assert progress.of("finished") == list(runs)
        assert len(results(tmp_path)) == 12
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert finish(runs).of("finished") == list(runs)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_a_run_is_what_train_makes_of_the_same_flags(self, tmp_path):
        runs = tiny_plan(tmp_path / "sweep", ("imgrad",))
        finish(runs)
        alone = subprocess.run(
            [*PROGRAM, "train", *runs[0].flags, *SHARE, "--run-dir", str(tmp_path / "alone" / "one")]
        )
        assert alone.returncode == 0
        assert list(results(tmp_path / "sweep").values()) == list(results(tmp_path / "alone").values())

    def test_one_that_fails_is_named_and_does_not_stop_the_others_and_is_tried_again(self, tmp_path):
        runs = tiny_plan(tmp_path)
        spoilt = runs[0].folder
        (spoilt).mkdir(parents=True)
        (spoilt / "thesis.tex").write_text("mine")
        progress = finish(runs)
        assert progress.states == {"mean-s1": "failed", "imgrad-s1": "finished"}
        assert re.fullmatch(r"exit code 2: mtrl-imgrad: run_dir: .* is not empty.*", progress.reasons["mean-s1"])
        (spoilt / "thesis.tex").unlink()
        assert finish(runs).states == {"mean-s1": "finished", "imgrad-s1": "finished"}

    def test_one_whose_folder_is_damaged_fails_alone(self, tmp_path):
        runs = tiny_plan(tmp_path)
        runs[0].folder.mkdir(parents=True)
        (runs[0].folder / "config.yaml").write_bytes(b"\xff\xfe")
        progress = finish(runs)
        assert progress.states == {"mean-s1": "failed", "imgrad-s1": "finished"}
        assert "config.yaml" in progress.reasons["mean-s1"]

    def test_one_that_was_not_evaluated_is_where_that_is_asked_for_later(self, tmp_path):
        finish(tiny_plan(tmp_path, ("mean",), (1,), "--eval.final", "False"))
        (run,) = tiny_plan(tmp_path, ("mean",))
        assert not (run.folder / "eval.csv").exists()
        assert run.state() == "interrupted"
        (asked,) = tiny_plan(tmp_path, ("mean",), (1,), "--eval.final", "True")
        assert finish([asked]).of("finished") == [asked]
        assert last_row(run.folder / "eval.csv")["step"] == "60"

    def test_one_whose_checkpoints_were_not_kept_stays_finished(self, tmp_path):
        finish(tiny_plan(tmp_path))
        measured = results(tmp_path)
        for path in tmp_path.glob("*/checkpoints"):
            shutil.rmtree(path)
        progress = finish(runs := tiny_plan(tmp_path))
        assert progress.of("finished") == list(runs)
        assert results(tmp_path) == measured
        assert not list(tmp_path.glob("*/checkpoints"))

    def test_a_longer_budget_goes_on_with_what_was_trained(self, tmp_path):
        finish(tiny_plan(tmp_path, ("mean",)))
        (longer,) = tiny_plan(tmp_path, ("mean",), (1,), "--sac.steps", "100")
        assert longer.state() == "interrupted"
        assert finish([longer]).of("finished") == [longer]
        assert last_row(longer.folder / "eval.csv")["step"] == "100"

    def test_a_run_that_another_process_trains_is_waited_for(self, tmp_path):
        (run,) = tiny_plan(tmp_path, ("mean",))
        finish([run])
        checkpoint = run.folder / "eval.csv"
        rows = checkpoint.read_text()
        checkpoint.unlink()  # interrupted before its final evaluation
        lock = FolderLock(run.folder)
        looks: list[str] = []

        def show(progress: Progress) -> None:
            looks.append(progress.states[run.name])
            if len(looks) == 3:
                checkpoint.write_text(rows)
                lock.release()

        assert finish([run], show=show).states == {run.name: "finished"}
        assert set(looks) == {"running", "finished"}
        assert len((run.folder / "command.txt").read_text().splitlines()) == 1, "it was not started again"


class TestKilled:
    """Whenever a comparison dies, the same command ends with the rows of one that was left alone."""

    def sweep(self, out: Path) -> subprocess.Popen[bytes]:
        program = (
            f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'comparison')!r}]\n"
            "from pathlib import Path\n"
            "from test_comparison import finish, tiny_plan\n"
            f"finish(tiny_plan(Path({str(out)!r}), ('mean', 'imgrad'), (1, 2)))"
        )
        return subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"TINY_PAUSE": "0.05"})

    def gone(self, out: Path) -> bool:
        return not any(is_locked(path.parent) for path in out.glob("*/lock"))

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere runs outlive a killed comparison")
    def test_its_runs_die_with_it(self, tmp_path, number):
        with self.sweep(tmp_path) as process:
            deadline = time.monotonic() + 120
            while self.gone(tmp_path):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
        while not self.gone(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_five_random_kills_change_no_row(self, tmp_path):
        finish(tiny_plan(tmp_path / "whole", ("mean", "imgrad"), (1, 2)))
        out, generator = tmp_path / "killed", random.Random(1)
        for number in range(5):
            saved = sorted(out.glob("*/checkpoints/*"))
            with self.sweep(out) as process:
                deadline = time.monotonic() + 120
                while sorted(out.glob("*/checkpoints/*")) == saved:  # until it trains, and has saved something
                    assert time.monotonic() < deadline
                    assert process.poll() is None, f"it ended before kill {number}"
                    time.sleep(0.02)
                time.sleep(generator.uniform(0.0, 0.5))
                process.kill()
        runs = tiny_plan(out, ("mean", "imgrad"), (1, 2))
        assert finish(runs).of("finished") == list(runs)
        assert sum((run.folder / "command.txt").read_text().count("--resume") for run in runs) >= 5
        assert results(out) == results(tmp_path / "whole")


class TestView:
    @pytest.mark.parametrize(
        "content", [b"", b"\xff\n\xfe\n", b'step,"a\n1,2\n', b"step\nmany\n", b"a\n" + b"x" * 200_000 + b"\n"]
    )
    def test_a_damaged_log_stands_for_nothing(self, tmp_path, content):
        (run,) = tiny_plan(tmp_path, ("mean",))
        run.folder.mkdir()
        (run.folder / "progress.csv").write_bytes(content)
        assert standing(run) == Standing(0, "", 0.0)

    def progress(self, tmp_path) -> Progress:
        runs = tiny_plan(tmp_path, ("mean", "imgrad", "cagrad"))
        for run, step in zip(runs, (60, 30, 0), strict=True):
            run.folder.mkdir(parents=True)
            (run.folder / "progress.csv").write_text(f"step,rollout/success_rate,time/elapsed\n{step},0.5,6.0\n")
        return Progress(runs, dict(zip((run.name for run in runs), ("finished", "running", "to do"), strict=True)))

    def test_time_left_is_that_of_the_missing_steps_at_the_speed_so_far(self, tmp_path):
        progress = self.progress(tmp_path)
        begun = {"mean-s1": 60, "imgrad-s1": 0, "cagrad-s1": 0}
        now = {run.name: standing(run) for run in progress.runs}
        left = time_left(progress, now, begun, time.monotonic() - 10.0)
        assert left == pytest.approx(10.0 / 30 * (30 + 60), rel=0.01)
        assert time_left(progress, now, {"mean-s1": 60, "imgrad-s1": 30, "cagrad-s1": 0}, 0.0) is None

    def test_one_line_says_it_all(self, tmp_path):
        progress = self.progress(tmp_path)
        line = summary(progress, {run.name: standing(run) for run in progress.runs}, 120.0)
        assert line == "1 of 3 finished; imgrad-s1 30/60 0.50; about 2 min left"

    def test_without_a_terminal_each_change_is_one_line(self, tmp_path, capsys):
        progress = self.progress(tmp_path)
        with progress_view(progress.runs) as show:
            show(progress)
            show(progress)
            progress.states["imgrad-s1"], progress.reasons["imgrad-s1"] = "failed", "exit code 1: [why]"
            show(progress)
        assert capsys.readouterr().out.splitlines() == [
            "mean-s1: finished",
            "imgrad-s1: running",
            "imgrad-s1: failed: exit code 1: [why]",
        ]

    def test_a_half_written_row_is_not_read(self, tmp_path):
        path = tmp_path / "progress.csv"
        assert last_row(path) == {}
        path.write_text("step,a\n")
        assert last_row(path) == {}
        path.write_text("step,a\n10,1\n20,")
        assert last_row(path) == {"step": "10", "a": "1"}


class TestEstimate:
    def test_parts_add_up(self, tmp_path):
        """60 steps of which 40 with updates; 3 evaluations of 2 goals and one of 4, 10 decisions each."""
        (run,) = tiny_plan(tmp_path, ("mean",))
        cost = Cost(start=5.0, step=0.1, update=1.0)
        assert cost.seconds(run, 0) == pytest.approx(5 + 60 * 0.1 + 40 * 1.0 + (3 * 2 + 4) * 10 * 0.1)
        assert cost.seconds(run, 40) == pytest.approx(5 + 20 * 0.1 + 20 * 1.0 + (1 * 2 + 4) * 10 * 0.1)

    def test_the_measurement_trains_for_a_moment_and_leaves_nothing(self, tmp_path):
        (run,) = tiny_plan(tmp_path, ("mean",))
        cost = measure(run, 2, SHARE, PROGRAM)
        assert 0 < cost.step < 1
        assert 0 < cost.update < 5
        assert cost.start > 0
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_cannot_be_trained_is_told(self, tmp_path):
        (run,) = plan(["mean"], [1], tmp_path, ["--benchmark.tasks", "raech-v3"])
        with pytest.raises(UserError, match=r"mean: .*reach-v3"):
            measure(run, 1, SHARE)


class TestCommand:
    def test_options_of_train_are_told_from_its_own(self):
        command = "--seeds 2 --config quickstart --aggregators mean imgrad --sac.target-entropy -4.0"
        own, flags = split(command.split())
        assert " ".join(own) == "--seeds 2 --aggregators mean imgrad"
        assert " ".join(flags) == "--config quickstart --sac.target-entropy -4.0"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--seed 3", "--seed: a comparison gives this"),
            ("--aggregator.c 3", "--aggregator.c: a comparison gives this"),
            ("--run-dir x", "--run-dir: a comparison gives this"),
            ("--seeds 0", "seeds: 0 is not allowed; it must be between 1 and 1000"),
            ("--jobs 0", "jobs: 0 is not allowed; it must be between 1 and 1000"),
            ("--first-seed -1", "first_seed: -1 is not allowed; it must be"),
            ("--aggregators", "aggregators"),
            ("--sac.stepz 3", r"sac\.stepz: there is no such option; the nearest is --sac.steps"),
            ("--seeds many", "seeds"),
            ("--job 2", r"job: there is no such option; the nearest is --jobs.\nSee `mtrl-imgrad compare --help`"),
            ("--cpus 2", "cpus: 2 is for --launcher ray"),
            ("--launcher ray --jobs 2", "jobs: 2 is for --launcher local"),
        ],
    )
    def test_a_mistake_is_exit_code_2_and_leaves_nothing(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert main(["compare", *arguments.split()]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said)
        assert len(said.splitlines()) <= 2
        assert list(tmp_path.iterdir()) == []

    def test_a_dry_run_measures_each_algorithm_once_and_touches_nothing(self, tmp_path, monkeypatch, capsys):
        """60 decisions at 0.1 s and 4 evaluations; 40 updates at 1 s (ours) and 2 s (the baseline's)."""
        costs = {"mtsac": Cost(start=5.0, step=0.1, update=1.0), "sb3-sac": Cost(start=5.0, step=0.1, update=2.0)}
        measured = []

        def measure(run, copies, divided):
            measured.append(run.name)
            return costs[run.config.algorithm]

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("mtrl_imgrad.comparison.command.measure", measure)
        monkeypatch.setattr("mtrl_imgrad.envs.expand_tasks", lambda names: names)  # the tiny world has its own
        command = ["compare", *TINY, "--aggregators", "mean", "imgrad", "sb3-sac", "--seeds", "2", "--dry-run"]
        assert main(command) == 0
        assert sorted(measured) == ["mean-s1", "sb3-sac-s1"]
        lines = capsys.readouterr().out.splitlines()
        ours, theirs = 5 + 6 + 40 + 10, 5 + 6 + 80 + 10
        assert [line.split() for line in lines[:3]] == [
            ["mean-s1", "to", "do", f"{ours / 60:.1f}", "min"],
            ["imgrad-s1", "to", "do", f"{ours / 60:.1f}", "min"],
            ["sb3-sac-s1", "to", "do", f"{theirs / 60:.1f}", "min"],
        ]
        assert lines[-1] == f"about {(4 * ours + 2 * theirs) / 3600:.1f} hours, 1 at once"
        assert list(tmp_path.iterdir()) == []

    def test_two_on_one_folder_are_refused_and_a_folder_that_cannot_be_made_too(self, tmp_path, capsys):
        command = ["compare", "--config", "quickstart", "--out"]
        lock = FolderLock(tmp_path)
        assert main([*command, str(tmp_path)]) == 2
        assert re.search(r"out: .* is in use by another process", capsys.readouterr().err)
        lock.release()
        (tmp_path / "file").write_text("")
        assert main([*command, str(tmp_path / "file")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mtrl-imgrad: out: ")

    def test_folders_are_named_by_the_whole_benchmark(self):
        for task in ("drawer-open-v3", "drawer-close-v3"):
            _, runs = planned(["--benchmark", task])
            assert runs[0].folder == Path("runs", f"compare-{task}", "mean-s1")

    def test_it_ends_with_0_then_does_nothing_and_names_what_failed_with_1(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        tiny_start = functools.partial(start_here, program=PROGRAM)
        monkeypatch.setattr("mtrl_imgrad.comparison.command.start_here", tiny_start)
        monkeypatch.setattr("mtrl_imgrad.envs.expand_tasks", lambda names: names)  # the tiny world has its own
        command = ["compare", *TINY, "--aggregators", "mean", "--seeds", "1", "--threads", "1"]
        assert main(command) == 0
        out = tmp_path / "runs" / "compare-2tasks"
        assert (out / "command.txt").read_text().count("compare") >= 1
        assert "mean-s1" in (out / "report" / "index.html").read_text()
        assert re.search(r"^mean +1 of 1 ", capsys.readouterr().out, re.MULTILINE)
        assert main(command) == 0
        assert "1 finished" in capsys.readouterr().out
        broken = out / "mean-s2"
        broken.mkdir()
        (broken / "thesis.tex").write_text("mine")
        assert main([*command[:-4], "--seeds", "2", "--threads", "1"]) == 1
        assert re.search(r"mean-s2 failed, exit code 2: .*see .*mean-s2\.log", capsys.readouterr().err)
