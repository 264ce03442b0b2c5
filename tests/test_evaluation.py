"""Evaluation: Meta-World's scripted policies solve its tasks in it, and its rows are those of a hand count."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_world import GOAL_DISTANCES, NEAR, SPEED, TinyVectorEnv, tiny_config

from mtrl_imgrad.config import Config, EvalConfig
from mtrl_imgrad.envs import MT10, MetaworldVectorEnv, make_goals
from mtrl_imgrad.evaluation import COLUMNS, Episode, evaluate, goal_subset, success_per_task, table, write_rows

TASKS = ("east", "north", "west", "south")


def walk_to_the_goal(observations: torch.Tensor) -> torch.Tensor:
    """The optimal policy of the tiny world. Observations `[K, 1, 3]` are position and distance of the goal."""
    angles = 2 * np.pi * torch.arange(len(observations)) / len(observations)
    goals = observations[..., 2:] * torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None]
    return ((goals - observations[..., :2]) / SPEED).clamp(-1, 1)


def episode(task="east", success=1, **fields) -> Episode:
    values = {"step": 100, "goal": 0, "episode": 0, "return_": -2.5, "steps_to_success": 3 if success else -1}
    return Episode(task=task, success=success, **(values | fields))


class TestMetaWorld:
    def test_scripted_policies_score_at_least_80_percent_on_8_of_the_mt10_tasks(self):
        from metaworld.policies import ENV_POLICY_MAP

        scripted = [ENV_POLICY_MAP[task]() for task in MT10]

        def act(observations: torch.Tensor) -> torch.Tensor:
            assert observations.shape == (10, 1, 39)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")
                actions = [p.get_action(x[0].double().numpy()) for p, x in zip(scripted, observations, strict=True)]
            return torch.as_tensor(np.stack(actions), dtype=torch.float32).clamp(-1, 1)[:, None]

        goals = make_goals(MT10, goal_seed=1)
        envs = MetaworldVectorEnv(MT10, goals, seed=0)
        rows = evaluate(act, envs, MT10, goal_subset(50, 5), 0, Config())
        envs.close()

        assert len(rows) == 50
        assert [row.goal for row in rows] == [0, 12, 24, 37, 49] * 10
        success = success_per_task(rows)
        assert tuple(success) == MT10
        assert sum(rate >= 0.8 for rate in success.values()) >= 8, success
        for row in rows:
            assert row.return_ > 0
            assert (1 <= row.steps_to_success <= 500) == bool(row.success)


class TestTinyWorld:
    def evaluate(self, act=walk_to_the_goal, goals=(0, 4, 9), config=None, **options) -> list[Episode]:
        config = config or tiny_config("")
        settings = {"horizon": config.eval.horizon, "action_repeat": config.envs.action_repeat} | options
        envs = TinyVectorEnv(TASKS, 10, 0, **settings)
        return evaluate(act, envs, TASKS, np.array(goals), 7, config)

    def test_every_chosen_goal_of_every_task_is_visited_once(self):
        rows = self.evaluate()
        assert [(row.task, row.goal, row.episode) for row in rows] == [
            (task, goal, number) for task in TASKS for number, goal in enumerate((0, 4, 9))
        ]
        assert {row.step for row in rows} == {7}

    def test_the_optimal_policy_succeeds_when_it_gets_near(self):
        for row in self.evaluate(goals=(0, 9)):
            # Along an axis at SPEED a step, success is the first step that ends within NEAR of the goal.
            ways = np.arange(1, 11) * SPEED
            first = int(np.argmax(ways > GOAL_DISTANCES[row.goal] - NEAR)) + 1
            assert (row.success, row.steps_to_success) == (1, first)
            left = np.maximum(GOAL_DISTANCES[row.goal] - ways, 0)
            assert row.return_ == pytest.approx(-left.sum(), abs=1e-4)

    def test_a_policy_that_stands_still_fails(self):
        for row in self.evaluate(lambda x: torch.zeros(len(x), 1, 2)):
            assert (row.success, row.steps_to_success) == (0, -1)
            assert row.return_ == pytest.approx(-10 * GOAL_DISTANCES[row.goal])

    def test_success_is_latched(self):
        """Running through the goal and away from it counts."""
        rows = self.evaluate(lambda x: walk_to_the_goal(torch.cat([0 * x[..., :2], x[..., 2:]], -1)))
        assert {row.success for row in rows} == {1}
        assert {row.steps_to_success for row in rows} <= {3, 4, 5}

    def test_a_success_does_not_leak_into_the_next_episode(self):
        calls = 0

        def only_in_the_first_episode(observations):
            nonlocal calls
            calls += 1
            return walk_to_the_goal(observations) * (calls <= 10)

        rows = self.evaluate(only_in_the_first_episode)
        assert [row.success for row in rows] == [1, 0, 0] * 4
        assert [row.steps_to_success for row in rows[1:3]] == [-1, -1]

    def test_steps_to_success_are_simulator_steps_rounded_up_to_a_decision(self):
        config = tiny_config("")
        config = replace(config, envs=replace(config.envs, action_repeat=4))
        once = {row.task: row.steps_to_success for row in self.evaluate(goals=(0,))}
        repeated = {row.task: row.steps_to_success for row in self.evaluate(goals=(0,), config=config)}
        assert set(once.values()) == {3}
        assert set(repeated.values()) == {4}

    def test_steps_to_success_never_exceed_the_horizon(self):
        config = tiny_config("", eval=EvalConfig(horizon=5))
        config = replace(config, envs=replace(config.envs, action_repeat=3))
        rows = self.evaluate(lambda x: 0.6 * walk_to_the_goal(x), goals=(9,), config=config)
        # The goal is near after 5 steps, in the second decision, which the horizon cuts from 3 steps to 2.
        assert {row.steps_to_success for row in rows} == {5}

    def test_a_terminated_episode_counts_no_further(self):
        """An environment that ends its episodes early starts the next one by itself; that one is not counted."""
        config = tiny_config("", eval=EvalConfig(horizon=10))
        rows = self.evaluate(lambda x: torch.zeros(len(x), 1, 2), goals=(3,), config=config, horizon=4, terminates=True)
        assert [row.return_ for row in rows] == pytest.approx([-4 * GOAL_DISTANCES[3]] * 4)

    def test_it_is_deterministic(self):
        assert self.evaluate() == self.evaluate()


class TestGoalSubset:
    @pytest.mark.parametrize(
        ("goals", "wanted", "chosen"),
        [
            (50, 5, [0, 12, 24, 37, 49]),
            (50, 1, [0]),
            (50, 50, list(range(50))),
            (3, 5, [0, 1, 2]),
            (1, 5, [0]),
        ],
        ids=lambda value: str(value) if isinstance(value, int) else "",
    )
    def test_known_subsets(self, goals, wanted, chosen):
        assert goal_subset(goals, wanted).tolist() == chosen

    @pytest.mark.parametrize("goals", [1, 2, 7, 49, 50])
    def test_as_many_distinct_goals_as_wanted(self, goals):
        for wanted in range(1, 51):
            chosen = goal_subset(goals, wanted)
            assert len(set(chosen.tolist())) == min(goals, wanted)
            assert chosen.min() == 0
            assert chosen.max() <= goals - 1


class TestRows:
    def test_the_columns_are_tidy(self, tmp_path):
        write_rows(tmp_path / "eval.csv", [episode()])
        with (tmp_path / "eval.csv").open(newline="") as file:
            header, row = csv.reader(file)
        assert header == COLUMNS == ["step", "task", "goal", "episode", "success", "return", "steps_to_success"]
        assert row == ["100", "east", "0", "0", "1", "-2.5", "3"]

    def test_rows_of_another_step_are_kept_and_those_of_the_same_step_replaced(self, tmp_path, read_csv):
        path = tmp_path / "eval.csv"
        write_rows(path, [episode(step=100), episode(step=100, task="west")])
        write_rows(path, [episode(step=200)])
        write_rows(path, [episode(step=100, success=0, return_=-9.0)])
        rows = sorted((row["step"], row["task"], row["success"], row["return"]) for row in read_csv(path))
        assert rows == [("100", "east", "0", "-9.0"), ("200", "east", "1", "-2.5")]
        assert [path.name for path in tmp_path.iterdir()] == ["eval.csv"]

    def test_a_return_keeps_every_digit(self, tmp_path, read_csv):
        write_rows(tmp_path / "eval.csv", [episode(return_=0.1 + 0.2)])
        assert float(read_csv(tmp_path / "eval.csv")[0]["return"]) == 0.1 + 0.2


class TestTable:
    rows = (
        [episode(steps_to_success=n, return_=float(n)) for n in (2, 4)]
        + [episode(success=0, return_=-6.0)] * 2
        + [episode("north-west", success=0, return_=-1.0)] * 4
    )

    def test_success_per_task(self):
        assert success_per_task(self.rows) == {"east": 0.5, "north-west": 0.0}

    def test_a_line_for_each_task_and_the_mean_over_tasks(self):
        header, *lines = (line.split() for line in table(self.rows).splitlines())
        assert header == ["task", "episodes", "success", "return", "steps", "to", "success"]
        assert lines == [
            ["east", "4", "0.50", "-2", "3"],
            ["north-west", "4", "0.00", "-1", "-"],
            ["mean", "over", "tasks", "8", "0.25"],
        ]

    @pytest.mark.parametrize("task", ["east", "handle-press-side-v3"], ids=["short name", "long name"])
    def test_columns_are_aligned(self, task):
        header, *lines = table([episode(task), episode(task)]).splitlines()
        ends = [header.index("episodes") + 8, header.index("success") + 7]
        for line in lines:
            assert all(line[end - 1].isdigit() and not line[end : end + 1].strip() for end in ends), line
