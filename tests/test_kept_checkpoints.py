"""Which checkpoints stay, which one is read, and what training and evaluation do where one is damaged."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import differences
from test_checkpoint import BLOCKS, names, save, value_of
from tiny_world import PowerCutError, dying_world, make_world, tiny_config, tiny_sac

from mtrl_imgrad import load, train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.checkpoint import read_manifest, save_checkpoint, verify
from mtrl_imgrad.config import CheckpointConfig, EvalConfig, LogConfig, NetworkConfig
from mtrl_imgrad.kept_checkpoints import best_success, choose_checkpoint, newest_step, prune

CPU = torch.device("cpu")


def spoil(path: Path) -> None:
    """Change one bit, under another inode, as a failing disk or a bad copy does."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


class TestWhatIsKept:
    def test_the_two_newest(self, tmp_path):
        base = None
        for step in (9, 100, 1000):
            base = save(tmp_path, step, float(step), BLOCKS, base)
        assert names(tmp_path) == ["0000000100", "0000001000"]
        assert value_of(tmp_path) == 1000.0

    def test_those_marked_without_their_replay(self, tmp_path):
        for step in (10, 20, 30, 40):
            save(tmp_path, step, float(step), kept=step == 20)
        assert names(tmp_path) == ["0000000020", "0000000030", "0000000040"]
        kept = read_manifest(tmp_path / "checkpoints" / "0000000020")
        verify(kept)
        assert (kept.resumable, kept.blocks("replay")) == (False, [])
        assert not list(kept.place.glob("replay*"))

    def test_what_a_user_put_beside_them_stays(self, tmp_path):
        save(tmp_path, 10, 1.0)
        (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
        (tmp_path / "checkpoints" / "mine.tmp").mkdir()
        for step in (20, 30, 40):
            save(tmp_path, step, 2.0)
        assert names(tmp_path) == ["0000000030", "0000000040", "mine.tmp", "notes.txt"]

    def test_what_killed_processes_left_goes(self, tmp_path):
        for name in ("0000000005.tmp", "best.tmp"):
            (tmp_path / "checkpoints" / name).mkdir(parents=True)
        save(tmp_path, 10, 1.0)
        assert names(tmp_path) == ["0000000010"]

    def test_after_damage_the_one_that_the_run_went_back_to_is_kept(self, tmp_path):
        for step in (40, 55):
            save(tmp_path, step, float(step))
        spoil(tmp_path / "checkpoints" / "0000000055" / "learner.safetensors")
        back = choose_checkpoint(tmp_path, resume=True)
        prune(tmp_path, save(tmp_path, 60, 60.0, base=back), back)
        assert names(tmp_path) == ["0000000040", "0000000060"]


class TestWhichIsRead:
    def test_a_bit_of_a_block_that_two_share_costs_training_but_not_the_networks(self, tmp_path, capsys):
        first = save(tmp_path, 10, 10.0, BLOCKS)
        save(tmp_path, 20, 20.0, BLOCKS, first)
        (shared,) = [name for name in BLOCKS if (first.place / f"{name}.safetensors").stat().st_nlink == 2][:1]
        path = first.place / f"{shared}.safetensors"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        with pytest.raises(ValueError, match=r"is damaged .*, and there is no whole one before it"):
            choose_checkpoint(tmp_path, resume=True)
        assert value_of(tmp_path) == 20.0

    def test_a_damaged_one_is_passed_over_and_named(self, tmp_path, capsys):
        for step in (10, 20):
            save(tmp_path, step, float(step))
        spoil(tmp_path / "checkpoints" / "0000000020" / "learner.safetensors")
        assert value_of(tmp_path) == 10.0
        (line,) = capsys.readouterr().err.splitlines()
        assert "0000000020 is damaged (learner.safetensors has another checksum); going on from" in line
        assert line.endswith("0000000010")

    def test_a_damaged_replay_matters_to_training_only(self, tmp_path, capsys):
        for step in (10, 20):
            save(tmp_path, step, float(step))
        spoil(tmp_path / "checkpoints" / "0000000020" / f"{BLOCKS[0]}.safetensors")
        assert choose_checkpoint(tmp_path).step == 20
        assert capsys.readouterr().err == ""
        assert choose_checkpoint(tmp_path, resume=True).step == 10

    def test_where_none_is_whole_one_line_says_so(self, tmp_path):
        for step in (10, 20):
            spoil(save(tmp_path, step, float(step)).place / "state.json")
        with pytest.raises(
            ValueError, match=r"run: .*0000000020 is damaged .*no whole one before it; use a copy of the run\.$"
        ):
            choose_checkpoint(tmp_path)

    def test_one_without_replay_is_not_trained_from(self, tmp_path):
        save(tmp_path, 10, 1.0, None)
        assert choose_checkpoint(tmp_path).step == 10
        with pytest.raises(ValueError, match=r"no checkpoint of .* has the replay .*; the run can be evaluated"):
            choose_checkpoint(tmp_path, resume=True)

    def test_a_step_or_the_best_can_be_named(self, tmp_path):
        for step in (10, 20):
            save(tmp_path, step, float(step))
        save_checkpoint(tmp_path, "best", 15, {"success": 0.5}, {"learner": lambda: {"x": torch.zeros(1)}})
        assert choose_checkpoint(tmp_path, "10").step == 10
        assert choose_checkpoint(tmp_path, "best").step == 15
        assert best_success(tmp_path) == 0.5
        for wrong in ("30", "../0000000010", "worst", ""):
            with pytest.raises(ValueError, match=r"checkpoint: .* there are newest, best, 10, 20\.$"):
                choose_checkpoint(tmp_path, wrong)

    def test_a_damaged_one_that_was_named_is_refused(self, tmp_path):
        for step in (10, 20):
            save(tmp_path, step, float(step))
        spoil(tmp_path / "checkpoints" / "0000000020" / "state.json")
        with pytest.raises(ValueError, match=r"run: checkpoint .*0000000020 is damaged"):
            choose_checkpoint(tmp_path, "20")

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match=r"run: .* has no checkpoint yet"):
            choose_checkpoint(tmp_path)
        assert (newest_step(tmp_path), best_success(tmp_path)) == (0, -1.0)

    @pytest.mark.parametrize("link", ["checkpoints", "checkpoints/0000000010", "checkpoints/0000000010/state.json"])
    def test_links_out_of_the_run_folder_are_refused(self, tmp_path, link):
        folder = tmp_path / "run"
        save(folder, 10, 1.0)
        (folder / link).rename(tmp_path / "elsewhere")
        (folder / link).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=rf"run: .*{link} is a link that leads out of the run folder"):
            choose_checkpoint(folder)

    def test_links_within_it_and_to_it_are_not(self, tmp_path):
        save(tmp_path / "run", 10, 1.0)
        (tmp_path / "run" / "newest").symlink_to("checkpoints/0000000010")
        (tmp_path / "name").symlink_to("run")
        assert value_of(tmp_path / "name") == 1.0


def short_config(run_dir: Path, **sections):
    """120 steps with an evaluation each 20 and a checkpoint each 30; blocks of the replay are 25 slots."""
    defaults = {
        "aggregator": Mean(),
        "sac": tiny_sac(steps=120, warmup=20, batch_per_task=8),
        "network": NetworkConfig(kind="multi_head", width=16, depth=2),
        "eval": EvalConfig(every=20, goals_per_task=3, horizon=10),
        "log": LogConfig(every=20, tensorboard=False),
        "checkpoint": CheckpointConfig(every=30),
    }
    return tiny_config(run_dir, **(defaults | sections))


@pytest.fixture
def _small_blocks(monkeypatch) -> None:
    monkeypatch.setattr("mtrl_imgrad.ring_blocks.BLOCK_BYTES", 25 * 4 * (2 * 12 + 8 + 4 + 2))


@pytest.mark.usefixtures("_small_blocks")
class TestRuns:
    def test_training_goes_on_from_the_one_before_and_gives_the_numbers_of_an_undisturbed_run(self, tmp_path, capsys):
        """Killed at 110, between the checkpoints of 90 and 120; the newest is damaged, so it goes on from 60."""
        straight = train(short_config(tmp_path / "straight"), make_world=make_world)
        config = short_config(tmp_path / "cut")
        with pytest.raises(PowerCutError):
            train(config, make_world=dying_world(110))
        spoil(tmp_path / "cut" / "checkpoints" / "0000000090" / "learner.safetensors")
        capsys.readouterr()
        train(config, resume=tmp_path / "cut", make_world=make_world)
        assert "0000000090 is damaged" in capsys.readouterr().err
        assert differences(tmp_path / "cut", straight) == set()

    def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(self, tmp_path):
        folder = train(short_config(tmp_path / "run"), make_world=make_world)
        for place in (folder / "checkpoints").glob("0*"):
            spoil(place / "state.json")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
        with pytest.raises(ValueError, match="no whole one before it"):
            train(short_config(folder), resume=folder, make_world=make_world)
        with pytest.raises(ValueError, match="no whole one before it"):
            load(folder)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"} == before

    def test_a_resumed_run_links_what_it_loaded(self, tmp_path):
        folder = train(short_config(tmp_path / "run"), make_world=make_world)
        longer = replace(short_config(folder), sac=tiny_sac(steps=140, warmup=20, batch_per_task=8))
        train(longer, resume=folder, make_world=make_world)
        before, after = (read_manifest(folder / "checkpoints" / name) for name in ("0000000120", "0000000140"))
        assert len(after.blocks("replay")) == 6
        shared = set(before.blocks("replay")) & set(after.blocks("replay"))
        assert len(shared) == 5, "all that were full"
        for name in shared:
            assert (before.place / f"{name}.safetensors").samefile(after.place / f"{name}.safetensors")

    def test_the_best_is_that_of_the_first_highest_evaluation(self, tmp_path, read_csv):
        folder = train(tiny_config(tmp_path / "run", eval=EvalConfig(every=100, horizon=10)), make_world=make_world)
        rows = read_csv(folder / "eval_training.csv")
        steps = sorted({int(row["step"]) for row in rows})
        means = [sum(int(row["success"]) for row in rows if int(row["step"]) == step) for step in steps]
        assert max(means) > min(means)
        best = choose_checkpoint(folder, "best")
        assert best.step == steps[means.index(max(means))]
        assert set(best.files) == {"state.json", "learner.safetensors"}
        assert load(folder, checkpoint="best").step == best.step

    def test_one_in_each_interval_is_kept_also_over_a_resume(self, tmp_path):
        """Checkpoints at 30, 60, ...; the first at or after each multiple of 50 stays."""
        saving = CheckpointConfig(every=30, keep_every=50)
        half = short_config(tmp_path / "run", checkpoint=saving)
        train(half, make_world=make_world)
        whole = replace(half, sac=tiny_sac(steps=240, warmup=20, batch_per_task=8))
        train(whole, resume=tmp_path / "run", make_world=make_world)
        kept = ["0000000060", "0000000120", "0000000150", "0000000210", "0000000240"]
        assert [name for name in names(tmp_path / "run") if name != "best"] == kept
        assert load(tmp_path / "run", checkpoint="60").step == 60

    def test_a_copy_of_the_run_folder_goes_on_as_well(self, tmp_path, read_progress):
        folder = train(short_config(tmp_path / "run"), make_world=make_world)
        shutil.copytree(folder, tmp_path / "copy")
        longer = replace(short_config(folder), sac=tiny_sac(steps=140, warmup=20, batch_per_task=8))
        for place in (folder, tmp_path / "copy"):
            train(replace(longer, run_dir=str(place)), resume=place, make_world=make_world)
        assert read_progress(folder) == read_progress(tmp_path / "copy")
