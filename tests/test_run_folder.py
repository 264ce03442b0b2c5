from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from tiny_world import make_world, tiny_config
from written_runs import TASKS, write_run

from mtrl_imgrad.checkpoint import FORMAT
from mtrl_imgrad.config import EvalConfig
from mtrl_imgrad.run_folder import find_run_folders, read_run_folder
from mtrl_imgrad.trainer import train

DONE = {"reach-v3": 7, "push-v3": 4}


def _checkpoint(folder, step):
    place = folder / "checkpoints" / f"{step:010d}"
    place.mkdir(parents=True)
    state = {"size": 0, "sha256": ""}
    manifest = {"format": FORMAT, "step": step, "kept": False, "resumable": True, "files": {"state.json": state}}
    (place / "manifest.json").write_text(json.dumps(manifest))


def test_folders_are_found_up_to_two_levels_down_and_once(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "sweep" / "two")
    write_run(tmp_path / "far" / "too" / "deep")
    assert find_run_folders([tmp_path]) == [one, two]
    assert find_run_folders([two, tmp_path / "sweep", one]) == [one, two]


def test_a_path_without_runs_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no run folder"):
        find_run_folders([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"emty does not exist; the nearest is empty"):
        find_run_folders([tmp_path / "emty"])


def test_a_run_that_training_wrote_is_read(tmp_path):
    config = tiny_config(tmp_path / "run", eval=EvalConfig(every=400, goals_per_task=3, horizon=10))
    run = read_run_folder(train(config, make_world=make_world))
    assert run.config == config
    assert (run.tasks, run.finished, run.last_step, run.goal_seed) == (config.benchmark.tasks, True, 800, 1)
    assert run.progress["step"].tolist()[-1] == 800
    assert run.progress["gradients/critic/cosine_mean"].shape == run.progress["step"].shape
    assert run.training_curve is not None
    assert run.training_curve.steps.tolist() == [400, 800]
    assert run.final_success is not None
    assert run.final_success.success.shape == (1, 4)
    assert run.package("metaworld") == "3.1.1"


def test_a_run_without_any_row_is_read(tmp_path):
    run = read_run_folder(write_run(tmp_path / "run"))
    assert (run.last_step, run.finished, run.training_curve, run.final_success) == (0, False, None, None)
    assert run.progress == {}


@pytest.mark.parametrize("end", ["300,0.", "300", '300,"0.5', "300,0.5"])
def test_a_line_that_is_still_being_written_is_ignored(tmp_path, end):
    folder = write_run(tmp_path / "run", progress=[{"step": 100, "x": 0.25}, {"step": 200, "x": 0.5}])
    with (folder / "progress.csv").open("a") as file:
        file.write(end)
    run = read_run_folder(folder)
    assert run.progress["x"].tolist() == [0.25, 0.5]
    assert run.last_step == 200


def test_cells_that_are_empty_or_no_numbers_are_nan(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "progress.csv").write_text("step,x\n100,\n200,words\n300,2\n")
    np.testing.assert_array_equal(read_run_folder(folder).progress["x"], [np.nan, np.nan, 2.0])


def test_an_evaluation_that_is_not_complete_does_not_count(tmp_path):
    folder = write_run(tmp_path / "run", final=DONE, training={100: 2, 200: 5})
    for name in ("eval.csv", "eval_training.csv"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:-1]))
    run = read_run_folder(folder)
    assert run.training_curve is not None
    assert run.training_curve.steps.tolist() == [100]
    assert (run.final_success, run.finished) == (None, False)


def test_tasks_are_in_the_order_of_the_network_whatever_that_of_the_rows(tmp_path):
    folder = write_run(tmp_path / "run", final={"push-v3": 4, "reach-v3": 7})
    curve = read_run_folder(folder).final_success
    assert curve is not None
    assert (curve.tasks, curve.success.tolist()) == (TASKS, [[0.7, 0.4]])


def test_an_evaluation_before_the_planned_end_is_not_the_final_one(tmp_path):
    folder = write_run(tmp_path / "run", final=DONE, steps=1000)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("steps: 1000", "steps: 2000"))
    run = read_run_folder(folder)
    assert (run.final_success, run.finished, run.last_step) == (None, False, 1000)


def test_a_run_that_was_trained_beyond_its_plan_is_not_finished(tmp_path):
    """Its success took more steps than config.yaml says."""
    folder = write_run(tmp_path / "run", final=DONE, steps=1000)
    _checkpoint(folder, 1000)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("steps: 1000", "steps: 800"))
    run = read_run_folder(folder)
    assert (run.final_success, run.finished, run.last_step) == (None, False, 1000)
    (folder / "config.yaml").write_text(
        text.replace("steps: 1000", "steps: 800").replace("final: true", "final: false")
    )
    assert not read_run_folder(folder).finished


def test_training_ends_after_whole_vector_steps(tmp_path):
    folder = write_run(tmp_path / "run", "--envs.envs-per-task", "3", final=DONE, steps=1000)
    (folder / "eval.csv").write_text((folder / "eval.csv").read_text().replace("1000,", "999,"))
    run = read_run_folder(folder)
    assert (run.planned_steps, run.finished) == (999, True)


@pytest.mark.parametrize(("step", "finished"), [(900, False), (1000, True)])
def test_without_a_final_evaluation_the_last_checkpoint_ends_a_run(tmp_path, step, finished):
    folder = write_run(tmp_path / "run", "--eval.final", "False")
    _checkpoint(folder, step)
    run = read_run_folder(folder)
    assert (run.finished, run.final_success, run.last_step) == (finished, None, step)


def test_with_a_final_evaluation_a_checkpoint_is_not_the_end(tmp_path):
    folder = write_run(tmp_path / "run")
    _checkpoint(folder, 1000)
    assert not read_run_folder(folder).finished


def test_all_versions_of_a_resumed_run_are_told(tmp_path):
    folder = write_run(tmp_path / "run")
    entries = [{"mujoco": "3.2.0"}, {"mujoco": "3.3.0"}, {"mujoco": "3.3.0"}]
    (folder / "versions.json").write_text(json.dumps(entries))
    run = read_run_folder(folder)
    assert run.package("mujoco") == "3.2.0, then 3.3.0"
    assert run.package("metaworld") == "unknown"


def test_a_rule_that_the_folder_names_is_read_and_never_imported(tmp_path, monkeypatch):
    """The module lies where `module:Class` is looked for, and would say that it was imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_rules.py").write_text("raise SystemExit('imported')\n")
    folder = write_run(tmp_path / "run", final=DONE)
    plain = yaml.safe_load((folder / "config.yaml").read_text())
    plain["aggregator"] = {"name": "their_rules:Rule", "power": 2.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    run = read_run_folder(folder)
    assert run.method == "their_rules:Rule"
    assert run.settings["aggregator"] == {"name": "their_rules:Rule", "power": 2.0}
    assert run.finished


@pytest.mark.parametrize("rule", ["imgrad", {}, {"name": ["imgrad"]}, {"name": "imgrad", "strength": 3}])
def test_a_damaged_aggregator_is_told(tmp_path, rule):
    folder = write_run(tmp_path / "run")
    plain = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(plain | {"aggregator": rule}))
    with pytest.raises(ValueError, match=r"configuration of this version|aggregator\.strength"):
        read_run_folder(folder)


def test_goals_are_equal_where_goals_json_is(tmp_path):
    same, again, other = (read_run_folder(write_run(tmp_path / n, seed=s)) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert same.goals == again.goals != other.goals


def test_damaged_files_are_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "goals.json").write_text("{")
    with pytest.raises(ValueError, match="run cannot be read"):
        read_run_folder(folder)


def test_final_success_is_that_of_the_evaluation(tmp_path, read_csv):
    folder = train(tiny_config(tmp_path / "run"), make_world=make_world)
    run = read_run_folder(folder)
    rows = read_csv(folder / "eval.csv")
    by_task = {t: np.mean([int(r["success"]) for r in rows if r["task"] == t]) for t in run.tasks}
    assert run.final_success is not None
    np.testing.assert_allclose(run.final_success.success[0], list(by_task.values()))
