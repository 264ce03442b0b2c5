"""What a run tells: progress.csv, TensorBoard, statistics of episodes and updates, and the glossary of their tags."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import make_world, tiny_config, tiny_sac

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import AGGREGATORS, Mean
from mtrl_imgrad.config import EvalConfig, LogConfig, NetworkConfig
from mtrl_imgrad.logs import Averages, EpisodeStatistics, ProgressCsv, Stopwatch
from mtrl_imgrad.sac_update import Metrics

GLOSSARY = Path(__file__).parents[1] / "docs" / "metrics.md"
TASKS = ("east", "north")


def run_config(run_dir: Path, **sections):
    defaults = {
        "aggregator": Mean(),
        "sac": tiny_sac(steps=80, warmup=20, batch_per_task=8),
        "network": NetworkConfig(width=8, depth=2),
        "eval": EvalConfig(every=40, goals_per_task=2, horizon=10),
        "log": LogConfig(every=20),
    }
    return tiny_config(run_dir, **(defaults | sections))


class TestProgressCsv:
    def write(self, path: Path, rows: dict[int, dict], keep_to: int = 0) -> None:
        writer = ProgressCsv(path, keep_to)
        for step, values in rows.items():
            writer.write(values, dict.fromkeys(values, ()), step)
        writer.close()

    def test_a_column_that_appears_later_is_empty_in_the_rows_before(self, tmp_path, read_csv):
        path = tmp_path / "progress.csv"
        self.write(path, {10: {"loss": 1.0}, 20: {"success": 0.5, "loss": 2.0}, 30: {"success": 1.0}})
        assert read_csv(path) == [
            {"step": "10", "loss": "1.0", "success": ""},
            {"step": "20", "loss": "2.0", "success": "0.5"},
            {"step": "30", "loss": "", "success": "1.0"},
        ]

    def test_opening_keeps_rows_up_to_the_step_and_drops_later_ones(self, tmp_path, read_csv):
        path = tmp_path / "progress.csv"
        self.write(path, {step: {"loss": float(step)} for step in (10, 20, 30, 40)})
        self.write(path, {30: {"loss": -1.0, "new": 1.0}}, keep_to=20)
        assert [(row["step"], row["loss"], row["new"]) for row in read_csv(path)] == [
            ("10", "10.0", ""),
            ("20", "20.0", ""),
            ("30", "-1.0", "1.0"),
        ]

    def test_a_new_run_starts_an_empty_file(self, tmp_path, read_csv):
        path = tmp_path / "progress.csv"
        self.write(path, {10: {"loss": 1.0}})
        self.write(path, {}, keep_to=0)
        assert read_csv(path) == []

    def test_every_digit_of_a_number_is_kept(self, tmp_path, read_csv):
        values = np.random.default_rng(0).standard_normal(20) * 10.0 ** np.arange(-10, 10)
        self.write(tmp_path / "progress.csv", {i: {"x": float(value)} for i, value in enumerate(values)})
        assert [float(row["x"]) for row in read_csv(tmp_path / "progress.csv")] == values.tolist()

    def test_a_row_is_on_disk_at_once(self, tmp_path, read_csv):
        writer = ProgressCsv(tmp_path / "progress.csv", 0)
        writer.write({"x": 1.0}, {"x": ()}, 1)
        assert len(read_csv(tmp_path / "progress.csv")) == 1


class TestAverages:
    def metrics(self, losses, norm) -> Metrics:
        return Metrics({"loss": torch.tensor(losses)}, {"norm": torch.tensor(norm)})

    def test_means_over_updates_per_task_and_over_tasks(self):
        averages = Averages()
        averages.add(self.metrics([1.0, 3.0], 5.0))
        averages.add(self.metrics([2.0, 5.0], 6.0))
        assert averages.pop(TASKS) == {"loss/east": 1.5, "loss/north": 4.0, "loss": 2.75, "norm": 5.5}

    def test_a_pop_starts_anew(self):
        averages = Averages()
        averages.add(self.metrics([1.0, 3.0], 5.0))
        averages.pop(TASKS)
        assert averages.pop(TASKS) == {}
        averages.add(self.metrics([7.0, 9.0], 0.0))
        assert averages.pop(TASKS)["loss"] == 8.0

    def test_sums_are_float64(self):
        """In float32 a sum of 2^24 ones stops growing."""
        averages = Averages()
        averages.add(self.metrics([2.0**24, 0.0], 0.0))
        averages.add(self.metrics([1.0, 0.0], 0.0))
        assert averages.pop(TASKS)["loss/east"] == (2**24 + 1) / 2

    def test_the_state_goes_on(self):
        straight, halved = Averages(), Averages()
        for part in ([1.0, 3.0], [2.0, 5.0]):
            straight.add(self.metrics(part, 5.0))
            halved.add(self.metrics(part, 5.0))
            resumed = Averages()
            resumed.load_state_dict(halved.state_dict())
            halved = resumed
        assert halved.pop(TASKS) == straight.pop(TASKS)


class TestEpisodeStatistics:
    def infos(self, success, returns, lengths):
        return {
            "success": np.array(success),
            "episode_return": np.array(returns, float),
            "episode_length": np.array(lengths),
        }

    def test_only_episodes_that_ended_count_and_rows_are_task_major(self):
        statistics = EpisodeStatistics(2)
        infos = self.infos([True, False, True, True], [1.0, 2.0, 30.0, 40.0], [7, 8, 9, 10])
        statistics.add(np.array([True, True, False, False]), infos)
        statistics.add(np.array([False, False, False, True]), infos)
        assert statistics.pop(TASKS) == {
            "rollout/success_rate": 0.75,
            "rollout/success_rate/east": 0.5,
            "rollout/success_rate/north": 1.0,
            "rollout/ep_rew_mean": 20.75,
            "rollout/ep_rew_mean/east": 1.5,
            "rollout/ep_rew_mean/north": 40.0,
            "rollout/ep_len_mean": 8.75,
            "rollout/ep_len_mean/east": 7.5,
            "rollout/ep_len_mean/north": 10.0,
        }

    def test_a_task_without_an_ended_episode_is_left_out(self):
        statistics = EpisodeStatistics(2)
        statistics.add(np.array([False, True]), self.infos([True, False], [1.0, 2.0], [5, 6]))
        tags = statistics.pop(TASKS)
        assert "rollout/success_rate/east" not in tags
        assert (tags["rollout/success_rate"], tags["rollout/ep_rew_mean"]) == (0.0, 2.0)
        assert statistics.pop(TASKS) == {}

    def test_the_state_goes_on(self):
        statistics, resumed = EpisodeStatistics(2), EpisodeStatistics(2)
        statistics.add(np.array([True, True]), self.infos([True, False], [1.0, 2.0], [5, 6]))
        resumed.load_state_dict(statistics.state_dict())
        assert resumed.pop(TASKS) == statistics.pop(TASKS)


class TestStopwatch:
    def test_steps_per_second_leave_evaluation_out(self, monkeypatch):
        clock = iter([0.0, 1.0, 3.0, 4.0, 10.0, 12.0, 20.0])
        monkeypatch.setattr("mtrl_imgrad.logs.time.perf_counter", lambda: next(clock))
        watch = Stopwatch(100)  # at 0 s
        with watch.measure("update"):  # 1 s to 3 s
            pass
        with watch.measure("evaluation"):  # 4 s to 10 s
            pass
        tags = watch.pop(160, 2)  # at 12 s: 60 steps of 2 tasks in 6 s
        assert tags == {
            "time/update_ms": 2000.0,
            "time/evaluation_ms": 6000.0,
            "time/fps": 20.0,
        }
        assert watch.shares() == "stepping 0.0%, update 10.0%, evaluation 30.0%, the rest 60.0%"  # at 20 s


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class TestTensorBoard:
    def test_it_has_what_progress_csv_has(self, tmp_path, read_csv):
        folder = train(run_config(tmp_path / "run"), make_world=make_world)
        written = scalars(folder)
        rows = read_csv(folder / "progress.csv")
        assert set(written) == set(rows[0]) - {"step"}
        for tag, points in written.items():
            expected = [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
            assert [step for step, _ in points] == [step for step, _ in expected]
            assert [value for _, value in points] == pytest.approx([value for _, value in expected], nan_ok=True)

    def test_after_a_resume_every_step_is_there_once(self, tmp_path):
        config = run_config(tmp_path / "run")
        train(config, make_world=make_world)
        longer = replace(config, sac=replace(config.sac, steps=160))
        train(longer, resume=tmp_path / "run", make_world=make_world)
        written = scalars(tmp_path / "run")
        assert [step for step, _ in written["train/updates"]] == list(range(20, 161, 20))
        assert [value for _, value in written["train/updates"]] == [max(0, step - 20) for step in range(20, 161, 20)]
        assert [step for step, _ in written["eval/success_rate"]] == [40, 80, 120, 160]

    def test_it_can_be_switched_off(self, tmp_path):
        folder = train(run_config(tmp_path / "run", log=LogConfig(tensorboard=False)), make_world=make_world)
        assert not (folder / "tensorboard").exists()


class TestConsole:
    def test_the_start_tells_what_a_user_wants_to_know(self, tmp_path, capsys):
        folder = train(run_config(tmp_path / "run"), make_world=make_world)
        said = capsys.readouterr().out
        assert f"run folder: {folder}\n" in said
        assert f"tensorboard --logdir {folder / 'tensorboard'}\n" in said
        assert "device: cpu" in said
        # Critic: (3 + 4 + 2) x 8 + 8, 8 x 8 + 8, 8 + 1, twice; actor: (3 + 4) x 8 + 8, 8 x 8 + 8, 8 x 4 + 4.
        assert f"parameters: {2 * (80 + 72 + 9) + (64 + 72 + 36)} shared, 0 of single tasks" in said
        assert said.count("min left") == 4
        assert "\x1b[" not in said
        assert "mean over tasks" in said

    def test_the_run_folder_says_which_versions_and_protocol(self, tmp_path):
        folder = train(run_config(tmp_path / "run"), make_world=make_world)
        (versions,) = json.loads((folder / "versions.json").read_text())
        assert versions["torch"].startswith(torch.__version__.partition("+")[0])
        assert versions["from_step"] == 0
        assert versions["protocol"] == "custom (v2 reward, horizon 10, 10 goals)"


class TestGlossary:
    """docs/metrics.md explains every tag, and no tag that does not exist."""

    def test_it_has_exactly_the_tags_of_all_aggregators_runs(self, tmp_path, read_csv):
        documented = set(re.findall(r"^\| `([^`]+)` \|", GLOSSARY.read_text(), flags=re.MULTILINE))
        documented |= {tag.replace("gradients/critic/", "gradients/actor/") for tag in documented}
        emitted = set()
        for name, rule in AGGREGATORS.items():
            config = run_config(tmp_path / name, aggregator=rule(), log=LogConfig(every=20, tensorboard=False))
            tags = set(read_csv(train(config, make_world=make_world) / "progress.csv")[0]) - {"step"}
            emitted |= {re.sub(r"/(east|north|west|south)$", "/<task>", tag) for tag in tags}
        assert emitted == documented

    def test_every_tag_has_a_formula_and_a_unit(self):
        table = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("| `")]
        assert len(table) > 30
        for line in table:
            tag, formula, unit = (cell.strip() for cell in line.strip("|").split("|"))
            assert tag
            assert formula
            assert unit
