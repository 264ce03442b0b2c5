"""The same comparison on a Ray cluster: a real one, on this machine."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from test_comparison import PROGRAM, SHARE, TINY_COMMAND, finish, results, tiny_plan

from mtrl_imgrad.cli import main
from mtrl_imgrad.comparison.gathering import Changes, apply, changes
from mtrl_imgrad.comparison.plan import plan
from mtrl_imgrad.comparison.ray_launcher import RayRun, on_ray
from mtrl_imgrad.comparison.sweep import Progress, run_all
from mtrl_imgrad.files import is_locked
from mtrl_imgrad.parsing import UserError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")  # Ray's own


def on_cluster(runs, show=lambda progress: None, cpus: float = 1) -> Progress:
    with on_ray("", cpus, 0, SHARE, runs[0].folder.parent / "logs", PROGRAM) as start:
        return run_all(runs, start, len(runs), show, every=0.1)


class TestCluster:
    def test_the_folders_are_those_of_local_runs(self, tmp_path):
        finish(tiny_plan(tmp_path / "local", ("mean", "imgrad"), (1, 2)))
        runs = tiny_plan(tmp_path / "ray", ("mean", "imgrad"), (1, 2))
        assert on_cluster(runs).of("finished") == list(runs)
        assert results(tmp_path / "ray") == results(tmp_path / "local")
        assert not any(is_locked(run.folder) for run in runs)

    def test_overlays_of_this_machine_reach_the_run_and_nothing_that_it_deleted_stays(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("mine.yaml").write_text("sac: {gamma: 0.5}\n")
        flags = TINY_COMMAND.replace("--log.tensorboard False", "--config mine.yaml").split()
        runs = plan(["cagrad,c=0.9"], [1], tmp_path / "ray", flags)
        assert on_cluster(runs).of("finished") == runs
        stored = yaml.safe_load((runs[0].folder / "config.yaml").read_text())
        assert (stored["sac"]["gamma"], stored["aggregator"]["c"]) == (0.5, 0.9)
        names = [path.name for path in (runs[0].folder / "tensorboard").iterdir()]
        assert sum("description" in name for name in names) == 1

    def test_an_interrupted_run_goes_on_from_its_checkpoint_and_a_failure_is_named(self, tmp_path):
        finish(tiny_plan(tmp_path / "local", ("mean",), (1,), "--sac.steps", "100"))
        finish(tiny_plan(tmp_path / "ray", ("mean",)))
        runs = tiny_plan(tmp_path / "ray", ("mean", "imgrad"), (1,), "--sac.steps", "100")
        runs[1].folder.mkdir()
        (runs[1].folder / "thesis.tex").write_text("mine")
        progress = on_cluster(runs)
        assert progress.states == {"mean-s1": "finished", "imgrad-s1": "failed"}
        assert re.fullmatch(r"exit code 2: mtrl-imgrad: run_dir: .* is not empty.*", progress.reasons["imgrad-s1"])
        ours, other = (results(tmp_path / name) for name in ("ray", "local"))
        assert ours["mean-s1/progress.csv"] == other["mean-s1/progress.csv"]
        commands = (runs[0].folder / "command.txt").read_text()
        assert commands.count("--resume") == 1

    def test_a_run_whose_machine_is_lost_is_started_again_from_its_copy(self, tmp_path, monkeypatch):
        finish(tiny_plan(tmp_path / "local", ("mean",)))
        runs = tiny_plan(tmp_path / "ray", ("mean",))
        monkeypatch.setenv("TINY_PAUSE", "0.1")
        started: list[RayRun] = []
        with on_ray("", 1, 0, SHARE, tmp_path / "logs", PROGRAM) as start:

            def remember(run):
                started.append(start(run))
                return started[-1]

            def lose_once(progress: Progress) -> None:
                if (runs[0].folder / "checkpoints").exists() and started[0].attempts == 1:
                    ray.kill(started[0].remote)

            progress = run_all(runs, remember, 1, lose_once, every=0.1)
        assert progress.states == {"mean-s1": "finished"}, progress.reasons
        assert started[0].attempts == 2
        assert results(tmp_path / "ray") == results(tmp_path / "local")

    def test_what_no_machine_has_is_told_at_once(self, tmp_path):
        with pytest.raises(UserError, match=r"cpus: a run wants 10000; no machine has more than \d+"):
            on_cluster(tiny_plan(tmp_path), cpus=10_000)
        with (
            pytest.raises(UserError, match="gpus: a run wants 64"),
            on_ray("", 1, 64, SHARE, tmp_path / "logs", PROGRAM),
        ):
            pass


class TestOptions:
    def test_without_ray_it_says_what_to_install(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "ray", None)
        assert main(["compare", "--launcher", "ray", "--config", "quickstart", "--out", "out"]) == 2
        assert 'pip install ".[ray]"' in capsys.readouterr().err

    def test_an_address_where_no_cluster_is(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        command = "compare --launcher ray --address 127.0.0.1:1 --config quickstart --out out"
        assert main(command.split()) == 2
        assert "address: '127.0.0.1:1' cannot be reached" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_an_address_without_ray_is_refused(self, capsys):
        assert main(["compare", "--address", "auto"]) == 2
        assert "address: 'auto' is for --launcher ray" in capsys.readouterr().err


class TestGathering:
    """A copy of a growing folder is, after each step, a folder that a run can go on from."""

    def write(self, folder: Path, step: int) -> None:
        place = folder / "checkpoints" / f"{step:010d}"
        place.mkdir(parents=True)
        (place / "state.json").write_text(str(step))
        (place / "learner.safetensors").write_bytes(bytes([step]) * 10)
        (folder / "progress.csv").write_text("".join(f"{k}\n" for k in range(step)))
        (folder / "tensorboard").mkdir(exist_ok=True)
        (folder / "tensorboard" / "events").write_bytes(bytes(step))

    def contents(self, folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def test_the_copy_follows_and_takes_only_what_changed(self, tmp_path):
        source, copy = tmp_path / "source", tmp_path / "copy"
        self.write(source, 1)
        new, known = changes(source, {})
        apply(new, copy)
        assert self.contents(copy) == self.contents(source)
        new, known = changes(source, known)
        assert new.files == {}
        (source / "progress.csv").write_text("0\n1\n2\n3\n")
        new, known = changes(source, known)
        assert list(new.files) == ["progress.csv"]
        apply(new, copy)
        self.write(source, 2)
        for path in (source / "checkpoints" / "0000000001").iterdir():
            path.unlink()
        (source / "checkpoints" / "0000000001").rmdir()
        new, known = changes(source, known)
        apply(new, copy)
        assert self.contents(copy) == self.contents(source)
        assert [path.name for path in (copy / "checkpoints").iterdir()] == ["0000000002"]

    def test_half_written_checkpoints_and_the_lock_stay_where_they_are(self, tmp_path):
        self.write(tmp_path / "source", 1)
        (tmp_path / "source" / "lock").write_text("process 1")
        (tmp_path / "source" / "checkpoints" / "0000000002.tmp").mkdir()
        (tmp_path / "source" / "checkpoints" / "0000000002.tmp" / "state.json").write_text("half")
        new, _ = changes(tmp_path / "source", {})
        assert not any("lock" in name or ".tmp" in name for name in new.files)
        assert new.checkpoints == ("0000000001",)

    def test_what_two_checkpoints_share_is_sent_and_kept_once(self, tmp_path):
        source, copy = tmp_path / "source", tmp_path / "copy"
        first, second = (source / "checkpoints" / name for name in ("0000000001", "0000000002"))
        self.write(source, 1)
        (first / "replay-0.safetensors").write_bytes(b"block")
        new, known = changes(source, {})
        apply(new, copy)
        self.write(source, 2)
        os.link(first / "replay-0.safetensors", second / "replay-0.safetensors")
        new, known = changes(source, known)
        assert b"block" not in new.files.values()
        apply(new, copy)
        fresh, _ = changes(source, {})
        assert list(fresh.files.values()).count(b"block") == 1
        apply(fresh, tmp_path / "fresh")
        for folder in (copy, tmp_path / "fresh"):
            assert self.contents(folder) == self.contents(source)
            assert len({path.stat().st_ino for path in folder.rglob("replay-0.safetensors")}) == 1
        (second / "replay-0.safetensors").unlink()  # it is kept without its replay
        (second / "manifest.json").write_text("without")
        new, known = changes(source, known)
        assert list(new.files) == ["checkpoints/0000000002/manifest.json"]
        apply(new, copy)
        assert self.contents(copy) == self.contents(source)

    def test_a_link_does_not_lead_out_of_the_folder(self, tmp_path):
        (tmp_path / "secret").write_text("own")
        changed = Changes({}, {"checkpoints/0000000001/state.json": "../secret"}, (), ())
        with pytest.raises(ValueError, match="outside"):
            apply(changed, tmp_path / "copy")

    @pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "checkpoints/../../outside"])
    def test_nothing_leads_out_of_the_folder(self, tmp_path, name):
        self.write(tmp_path / "source", 1)
        new, _ = changes(tmp_path / "source", {})
        (tmp_path / "copy").mkdir()
        with pytest.raises(ValueError, match="outside"):
            apply(type(new)({name: b"x"}, {}, (), ()), tmp_path / "copy")
        assert not (tmp_path / "outside").exists()
