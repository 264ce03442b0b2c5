"""What TensorBoard shows of a run: read back from its event files as TensorBoard reads them."""

from __future__ import annotations

import io
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_world import PowerCutError, dying_world, make_world, tiny_config, tiny_sac

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import IMGrad
from mtrl_imgrad.config import CheckpointConfig, Config, EvalConfig, LogConfig, NetworkConfig, to_dict
from mtrl_imgrad.evaluation import COLUMNS
from mtrl_imgrad.gradient_cosines import heat_map
from mtrl_imgrad.tensorboard import TensorBoard, flattened, hyperparameters, layout, markdown_table

TASKS = ("east", "north", "west", "south")


def run_config(run_dir: Path, **sections: Any) -> Config:
    defaults = {
        "aggregator": IMGrad(),
        "sac": tiny_sac(steps=80, warmup=20, batch_per_task=8),
        "network": NetworkConfig(width=8, depth=2),
        "eval": EvalConfig(every=40, goals_per_task=2, horizon=10),
        "log": LogConfig(every=20),
        "checkpoint": CheckpointConfig(every=30),
    }
    return tiny_config(run_dir, **(defaults | sections))


def events(folder: Path) -> EventAccumulator:
    kinds = ("scalars", "images", "histograms", "tensors")
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance=dict.fromkeys(kinds, 0))
    return accumulator.Reload()


def everything(folder: Path) -> dict[str, list[tuple[int, object]]]:
    """Every tag's steps and values."""
    found = events(folder)
    tags = found.Tags()
    shown: dict[str, list[tuple[int, object]]] = {}
    shown |= {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags["scalars"]}
    shown |= {tag: [(x.step, x.encoded_image_string) for x in found.Images(tag)] for tag in tags["images"]}
    shown |= {tag: [(x.step, x.histogram_value) for x in found.Histograms(tag)] for tag in tags["histograms"]}
    shown |= {tag: [(x.step, tuple(x.tensor_proto.string_val)) for x in found.Tensors(tag)] for tag in tags["tensors"]}
    return shown


def said(folder: Path, tag: str) -> str:
    (event,) = events(folder).Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def hyperparameter_events(folder: Path) -> dict[str, HParamsPluginData]:
    content = events(folder).PluginTagToContent("hparams")
    return {tag: HParamsPluginData.FromString(data) for tag, data in content.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    return train(run_config(tmp_path_factory.mktemp("straight") / "run"), make_world=make_world)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The same run, which died at step 55 after a checkpoint at step 30, again at 75, and was resumed each time."""
    config = run_config(tmp_path_factory.mktemp("interrupted") / "run")
    folder = Path(config.run_dir)
    with pytest.raises(PowerCutError):
        train(config, make_world=dying_world(55))
    with pytest.raises(PowerCutError):
        train(config, resume=folder, make_world=dying_world(75 - 30))
    return train(config, resume=folder, make_world=make_world)


class TestScalars:
    def test_they_are_progress_csv_and_the_final_evaluation(self, straight, read_csv):
        rows = read_csv(straight / "progress.csv")
        shown = {tag: everything(straight)[tag] for tag in events(straight).Tags()["scalars"]}
        final = {tag: points for tag, points in shown.items() if tag.startswith("final/")}
        assert set(shown) - set(final) == set(rows[0]) - {"step"}
        for tag in set(shown) - set(final):
            expected = [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
            assert [step for step, _ in shown[tag]] == [step for step, _ in expected]
            assert [value for _, value in shown[tag]] == pytest.approx([value for _, value in expected], nan_ok=True)

        episodes = read_csv(straight / "eval.csv")
        assert list(episodes[0]) == COLUMNS
        rates = {task: np.mean([int(row["success"]) for row in episodes if row["task"] == task]) for task in TASKS}
        expected = {f"final/success_rate/{task}": rate for task, rate in rates.items()}
        expected["final/success_rate"] = np.mean(list(rates.values()))
        assert {tag: points[0][0] for tag, points in final.items()} == dict.fromkeys(expected, 80)
        assert {tag: points[0][1] for tag, points in final.items()} == pytest.approx(expected)

    def test_without_a_final_evaluation_there_are_no_final_tags(self, tmp_path):
        evaluation = EvalConfig(every=40, goals_per_task=2, horizon=10, final=False)
        folder = train(run_config(tmp_path / "run", eval=evaluation), make_world=make_world)
        assert not [tag for tag in everything(folder) if tag.startswith("final/")]

    def test_it_can_be_switched_off(self, tmp_path, read_csv):
        folder = train(run_config(tmp_path / "run", log=LogConfig(tensorboard=False)), make_world=make_world)
        assert not (folder / "tensorboard").exists()
        assert {row["step"] for row in read_csv(folder / "gradient_cosines.csv")} == {"40", "80"}


class TestResume:
    def test_an_interrupted_run_shows_what_an_uninterrupted_one_shows(self, straight, interrupted):
        differing = ("time/", "command/", "versions/", "configuration/")  # the last one names the run folder
        shown, expected = (
            {tag: points for tag, points in everything(folder).items() if not tag.startswith(differing)}
            for folder in (interrupted, straight)
        )
        assert {"eval/success_rate", "gradients/critic/cosine", "parameters/actor/trunk.0.weight"} <= set(expected)
        assert set(shown) == set(expected)
        for tag, points in expected.items():
            assert [step for step, _ in shown[tag]] == [step for step, _ in points], tag
            np.testing.assert_equal([value for _, value in shown[tag]], [value for _, value in points], tag)

    def test_the_cosines_are_in_its_table_too(self, straight, interrupted):
        read = [(folder / "gradient_cosines.csv").read_text() for folder in (straight, interrupted)]
        assert read[0] == read[1]
        assert {line.split(",")[0] for line in read[0].splitlines()[1:]} == {"40", "80"}

    def test_texts_are_there_once_and_tell_the_whole_history(self, interrupted):
        assert len(said(interrupted, "command").splitlines()) == 3
        assert said(interrupted, "versions").count("custom (v2 reward, horizon 10, 10 goals)") == 3
        assert said(interrupted, "configuration").count("| sac.steps | 80 |") == 1

    def test_a_longer_run_loses_the_final_results_of_the_shorter_until_it_has_its_own(self, tmp_path):
        config = run_config(tmp_path / "run")
        folder = train(config, make_world=make_world)
        longer = replace(config, sac=replace(config.sac, steps=120))
        with pytest.raises(PowerCutError):
            train(longer, resume=folder, make_world=dying_world(10))
        assert "final/success_rate" not in everything(folder)
        assert SESSION_END_INFO_TAG not in hyperparameter_events(folder)
        train(longer, resume=folder, make_world=make_world)
        assert [step for step, _ in everything(folder)["final/success_rate"]] == [120]
        start = hyperparameter_events(folder)[SESSION_START_INFO_TAG].session_start_info
        assert start.hparams["sac.steps"].number_value == 120

    def test_a_finished_run_that_is_resumed_shows_the_same_again(self, tmp_path):
        config = run_config(tmp_path / "run")
        folder = train(config, make_world=make_world)
        before = {tag: [step for step, _ in points] for tag, points in everything(folder).items()}
        train(config, resume=folder, make_world=make_world)
        assert {tag: [step for step, _ in points] for tag, points in everything(folder).items()} == before

    @pytest.mark.parametrize("which", ["straight", "interrupted"])
    def test_it_is_one_run(self, which, request):
        folder = request.getfixturevalue(which) / "tensorboard"
        runs = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload().Runs()
        assert len(runs) == 1
        assert all(path.is_file() for path in folder.iterdir())
        assert len(list(folder.glob("*.description"))) == 1

    def test_a_reader_meets_the_description_of_the_start_before_the_events(self, tmp_path):
        """Readers go through the files in the order of their names, and do not come back to one that may still grow."""
        with pytest.raises(PowerCutError):
            train(run_config(tmp_path / "run"), make_world=dying_world(25))
        first, second = sorted(path.name for path in (tmp_path / "run" / "tensorboard").iterdir())
        assert first.endswith(".description")
        assert not second.endswith(".description")

    def test_and_that_of_the_end_after_them_even_within_one_second(self, tmp_path, monkeypatch):
        """Before them, its results would be hidden as what an interrupted process left."""
        monkeypatch.setattr(time, "time", lambda: 1.8e9)
        with pytest.raises(PowerCutError):
            train(run_config(tmp_path / "run"), make_world=dying_world(75))
        folder = train(run_config(tmp_path / "run"), resume=tmp_path / "run", make_world=make_world)
        *_, last = sorted(path.name for path in (folder / "tensorboard").iterdir())
        assert last.endswith(".description")
        assert [step for step, _ in everything(folder)["final/success_rate"]] == [80]


class TestCosines:
    @pytest.mark.parametrize("network", ["critic", "actor"])
    def test_there_is_a_picture_at_every_evaluation_with_updates(self, straight, network):
        pictures = events(straight).Images(f"gradients/{network}/cosine")
        assert [picture.step for picture in pictures] == [40, 80]
        expected = heat_map(np.eye(4), TASKS, f"gradients/{network}/cosine at step 40").shape
        for picture in pictures:
            decoded = Image.open(io.BytesIO(picture.encoded_image_string))
            assert np.asarray(decoded).shape == expected == (picture.height, picture.width, 3)

    def test_the_picture_is_that_of_the_rows(self, straight, read_csv):
        """The table has five decimals; the picture of what it says is the same to a shade of one colour."""
        matrix = np.eye(4)
        for row in read_csv(straight / "gradient_cosines.csv"):
            if (row["step"], row["network"]) == ("80", "critic"):
                i, j = TASKS.index(row["task_a"]), TASKS.index(row["task_b"])
                matrix[i, j] = matrix[j, i] = float(row["cosine"])
        drawn = Image.open(io.BytesIO(events(straight).Images("gradients/critic/cosine")[-1].encoded_image_string))
        expected = heat_map(matrix, TASKS, "gradients/critic/cosine at step 80")
        assert np.abs(np.asarray(drawn).astype(int) - expected).max() < 4


class TestDescription:
    def test_the_layout_is_there_once(self, straight, interrupted):
        for folder in (straight, interrupted):
            (event,) = events(folder).Tensors("custom_scalars__config__")
            categories = Layout.FromString(event.tensor_proto.string_val[0]).category
            titles = ["Success per task", "Weights per task", "Losses", "Gradient conflict"]
            assert [category.title for category in categories] == titles

    def test_every_chart_matches_tags_that_the_run_has(self, straight):
        tags = events(straight).Tags()["scalars"]
        for category in layout(TASKS).values():
            for _, patterns in category.values():
                for pattern in patterns:
                    assert len([tag for tag in tags if re.match(pattern, tag)]) == 1, pattern

    def test_no_chart_of_fifty_tasks_has_more_than_ten_lines(self):
        tasks = [f"task-{k}" for k in range(50)]
        charts = {name: patterns for category in layout(tasks).values() for name, (_, patterns) in category.items()}
        assert max(len(patterns) for patterns in charts.values()) == 10
        shown = {pattern for name, patterns in charts.items() if name.startswith("evaluation") for pattern in patterns}
        assert len(shown) == 50
        assert "evaluation, tasks 41-50" in charts

    def test_the_configuration_is_a_table_of_every_field(self, straight):
        table = said(straight, "configuration").splitlines()
        config = run_config(straight)
        assert table[:2] == ["| field | value |", "|---|---|"]
        assert len(table) == 2 + len(flattened(to_dict(config)))
        assert "| aggregator.name | imgrad |" in table
        assert "| benchmark.tasks | east, north, west, south |" in table

    def test_a_cell_cannot_break_the_table(self):
        assert markdown_table([("a", "b"), ("x|y", "two\nlines")]).splitlines() == [
            "| a | b |",
            "|---|---|",
            "| x&#124;y | two lines |",
        ]

    def test_hyperparameters_are_what_decides_the_numbers(self):
        fields = flattened(to_dict(run_config(Path("somewhere"))))
        found = hyperparameters(fields)
        assert found["aggregator.name"] == "imgrad"
        assert found["benchmark.tasks"] == "east, north, west, south"
        assert found["sac.steps"] == 80
        assert found["envs.pipeline"] == "False"
        assert found["envs.goal_seed"] == "None"
        assert not {"run_dir", "threads", "log.every", "checkpoint.every", "device"} & set(found)

    def test_hyperparameters_and_metrics_are_in_the_one_run(self, straight):
        found = hyperparameter_events(straight)
        assert set(found) == {EXPERIMENT_TAG, SESSION_START_INFO_TAG, SESSION_END_INFO_TAG}
        metrics = [info.name.tag for info in found[EXPERIMENT_TAG].experiment.metric_infos]
        assert metrics == ["eval/success_rate", "final/success_rate"]
        assert set(metrics) <= set(events(straight).Tags()["scalars"])
        start = found[SESSION_START_INFO_TAG].session_start_info.hparams
        assert start["aggregator.name"].string_value == "imgrad"
        assert start["sac.batch_per_task"].number_value == 8


class TestHistograms:
    def test_parameters_by_layer_and_numbers_over_tasks(self, straight):
        found = events(straight)
        over_tasks = {"eval/success_rate"} | {
            f"gradients/{network}/{tag}" for network in ("critic", "actor") for tag in ("weight", "norm")
        }
        tags = found.Tags()["histograms"]
        assert {tag.removeprefix("over_tasks/") for tag in tags if tag.startswith("over_tasks/")} == over_tasks
        for tag in tags:
            for event in found.Histograms(tag):
                assert event.step in (40, 80)
                assert not tag.startswith("over_tasks/") or event.histogram_value.num == len(TASKS)
        weights = found.Histograms("parameters/actor/trunk.0.weight")[-1].histogram_value
        assert weights.num == (3 + len(TASKS)) * 8

    def test_numbers_that_are_not_finite_are_left_out(self, tmp_path):
        writer = TensorBoard(tmp_path / "tensorboard", 1)
        values = {"eval/success_rate/east": math.nan, "eval/success_rate/north": 0.5}
        values |= {"gradients/critic/norm/east": math.inf, "gradients/critic/norm/north": math.nan}
        writer.evaluation(10, ("east", "north"), values, {}, {})
        writer.close()
        found = events(tmp_path)
        assert found.Tags()["histograms"] == ["over_tasks/eval/success_rate"]
        assert found.Histograms("over_tasks/eval/success_rate")[0].histogram_value.num == 1
