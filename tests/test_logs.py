"""What a run tells: progress.csv, TensorBoard, statistics of episodes and updates, and the glossary of their tags."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import make_world, tiny_config, tiny_sac

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import AGGREGATORS, Mean
from mtrl_imgrad.config import EvalConfig, LogConfig, NetworkConfig
from mtrl_imgrad.logs import EpisodeStatistics, ProgressCsv, Stopwatch

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


def tags_of(glossary: str) -> set[str]:
    """The tags that a part of the glossary explains."""
    documented = set(re.findall(r"^\| `([^`]+)` \|", glossary, flags=re.MULTILINE))
    return documented | {tag.replace("gradients/critic/", "gradients/actor/") for tag in documented}


class TestGlossary:
    """docs/metrics.md explains every tag, and no tag that does not exist."""

    def test_it_has_exactly_the_tags_of_all_aggregators_runs(self, tmp_path, read_csv):
        glossary = GLOSSARY.read_text().partition("\n## ")[0]
        emitted = {"final/success_rate", "final/success_rate/<task>"}  # TensorBoard only: tests/test_tensorboard.py
        for name, rule in AGGREGATORS.items():
            config = run_config(tmp_path / name, aggregator=rule(), log=LogConfig(every=20, tensorboard=False))
            tags = set(read_csv(train(config, make_world=make_world) / "progress.csv")[0]) - {"step"}
            emitted |= {re.sub(r"/(east|north|west|south)$", "/<task>", tag) for tag in tags}
        assert emitted == tags_of(glossary)

    def test_it_has_exactly_the_pictures_histograms_and_texts_of_a_run(self, tmp_path):
        folder = train(run_config(tmp_path / "run"), make_world=make_world)
        tags = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()
        texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"] if tag.endswith("/text_summary")}
        emitted = {
            re.sub(r"^parameters/(actor|critic)/.+", "parameters/<network>/<parameter>", x) for x in tags["histograms"]
        }
        glossary = GLOSSARY.read_text().partition("\n## ")[2]
        assert emitted | texts | set(tags["images"]) == tags_of(glossary)

    def test_every_tag_has_a_formula_and_a_unit(self):
        table = [line for line in GLOSSARY.read_text().splitlines() if line.startswith("| `")]
        assert len(table) > 30
        for line in table:
            tag, formula, unit = (cell.strip() for cell in line.strip("|").split("|"))
            assert tag
            assert formula
            assert unit
