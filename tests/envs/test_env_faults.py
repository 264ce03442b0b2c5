"""Rows that give no finite numbers, and real blow-ups of MuJoCo: the row starts over, and nobody else notices."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import zero_cost
from exploding import KINDS, STEP, TASK, Exploding, blow_up

from mtrl_imgrad.envs import Goals, MetaworldTaskEnv, MetaworldVectorEnv, make_goals

TASKS = ("reach-v3", "push-v3", "window-open-v3")
ZERO_COST_GOALS = Goals(0, {task: np.arange(50.0)[:, None] for task in TASKS})
HORIZON = 9
BROKEN, OTHERS = 2, [0, 1, 3, 4, 5]
"""Rows: two environments per task, and the first one of push-v3 goes wrong."""


@pytest.fixture(scope="module")
def goals():
    return make_goals(TASKS, goal_seed=1, num_goals=5)


@pytest.fixture
def make_env(goals, tmp_path, monkeypatch):
    """Constructs vector envs, closes them after the test, and sees that nothing is left in the current folder."""
    monkeypatch.chdir(tmp_path)
    envs = []

    def make(maker=None, *, workers=0, horizon=HORIZON, **arguments):
        used = ZERO_COST_GOALS if maker and maker.func is zero_cost.Spoiling else goals
        makers = {"maker": maker} if maker else {}
        settings = {"seed": 3, "envs_per_task": 2, "self_check": False} | arguments | makers
        envs.append(MetaworldVectorEnv(TASKS, used, workers=workers, horizon=horizon, **settings))
        return envs[-1]

    yield make
    for env in envs:
        env.close()
    assert list(tmp_path.iterdir()) == []


def random_actions(steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 6, 4)).astype(np.float32)


def assert_rows_equal(left, right, rows):
    """Bit for bit, in all that two steps have given."""
    *left_arrays, left_infos = left
    *right_arrays, right_infos = right
    for ours, theirs in zip(left_arrays, right_arrays, strict=True):
        assert ours[rows].tobytes() == theirs[rows].tobytes()
    for name in left_infos:
        assert left_infos[name][rows].tobytes() == right_infos[name][rows].tobytes(), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("reward", math.nan),
        ("reward", math.inf),
        ("observation", math.nan),
        ("observation", -math.inf),
        ("simulation", 0),
    ],
)
class TestNumbersThatAreNotFinite:
    """Every row of push-v3 goes wrong in its third step."""

    def test_the_rows_are_truncated_and_start_over_with_their_goals_until_the_others_end(
        self, make_env, workers, what, value
    ):
        env = make_env(partial(zero_cost.Spoiling, what, value), workers=workers)
        _, infos = env.reset()
        goals = infos["goal"]
        steps = [env.step(actions) for actions in random_actions(HORIZON)]
        broken = [False, False, True, True, False, False]
        for number, (observations, _, terminated, truncated, infos) in enumerate(steps, start=1):
            wrong = number % 3 == 0  # their third step, whenever they have started over
            last = number == HORIZON
            assert not terminated.any()
            assert truncated.tolist() == [last or (wrong and row) for row in broken]
            assert infos["_final_obs"].tolist() == truncated.tolist()
            np.testing.assert_array_equal(infos["goal"], goals)
            since = [(number - 1) % 3 + 1 if row else number for row in broken]
            assert infos["episode_length"].tolist() == since
            assert np.isfinite(observations).all()
            if not last:
                assert observations[:, 0].tolist() == goals.tolist()
                assert observations[:, 1].tolist() == [
                    0 if wrong and row else n for n, row in zip(since, broken, strict=True)
                ]

    def test_what_was_wrong_is_given_and_stays_out_of_return_and_success(self, make_env, workers, what, value):
        env = make_env(partial(zero_cost.Spoiling, what, value), workers=workers)
        env.reset()
        actions = random_actions(4)
        first, second, (_, rewards, _, _, infos), after = (env.step(own) for own in actions)
        assert not any(step[4]["unstable"].any() for step in (first, second, after))
        assert infos["unstable"].tolist() == [False, False, *[what == "simulation"] * 2, False, False]
        assert np.isfinite(rewards).tolist() == [True, True, *[what == "observation"] * 2, True, True]
        assert np.isfinite(infos["final_obs"]).all(axis=1).tolist() == [
            True,
            True,
            *[what != "observation"] * 2,
            True,
            True,
        ]
        np.testing.assert_array_equal(infos["episode_return"][2:4], first[1][2:4] + second[1][2:4])
        assert infos["success"].tolist() == [True, True, False, False, True, True]  # zero_cost's third step succeeds
        np.testing.assert_array_equal(after[4]["episode_return"][2:4], after[1][2:4])


class TestBlowUps:
    """MuJoCo resets a simulation that has become unstable, silently; the fourth step is such a one."""

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_row_is_cut_there_and_the_others_keep_every_bit(self, make_env, capfd, kind, fast):
        self.check(make_env, partial(Exploding, kind), 0, fast)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("fast", [True, False])
    def test_it_is_the_same_in_workers(self, make_env, capfd, fast):
        self.check(make_env, partial(Exploding, "velocity"), 2, fast)
        assert capfd.readouterr() == ("", "")

    @staticmethod
    def check(make_env, maker, workers, fast):
        exploding, well = make_env(maker, workers=workers, fast=fast), make_env(fast=fast)
        exploding.reset()
        well.reset()
        for number, actions in enumerate(random_actions(2 * HORIZON + 2), start=1):
            ours, expected = exploding.step(actions), well.step(actions)
            assert_rows_equal(ours, expected, OTHERS)
            assert ours[4]["unstable"].tolist() == [number == STEP and row == BROKEN for row in range(6)]
            if number < STEP or number > HORIZON:  # before, and once all rows have begun another episode
                assert_rows_equal(ours, expected, [BROKEN])
            if number == STEP:
                assert np.isnan(ours[1][BROKEN])
                assert ours[3].tolist() == [row == BROKEN for row in range(6)]

    @pytest.mark.parametrize("fast", [True, False])
    def test_the_episode_after_it_is_one_from_a_reset(self, make_env, fast):
        exploding, well = make_env(partial(Exploding, "position"), fast=fast), make_env(fast=fast)
        goal = exploding.reset()[1]["goal"][BROKEN]
        actions = random_actions(HORIZON)
        steps = [exploding.step(own) for own in actions]
        first, _ = well.reset(options={"goals": np.full((6, 1), goal)})
        np.testing.assert_array_equal(steps[STEP - 1][0][BROKEN], first[BROKEN])
        for own, given in zip(actions[STEP : HORIZON - 1], steps[STEP : HORIZON - 1], strict=True):
            expected = well.step(own)
            for ours, theirs in zip(given[:2], expected[:2], strict=True):
                assert ours[BROKEN].tobytes() == theirs[BROKEN].tobytes()

    @pytest.mark.parametrize("again", [True, False], ids=["that blows up again", "that does not"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_moment_after_it_is_restored_to_the_bit_in_an_env(self, make_env, workers, again):
        maker = partial(Exploding, "force")
        first = make_env(maker, workers=workers)
        second = make_env(maker if again else None, workers=workers)
        first.reset()
        actions = random_actions(2 * HORIZON)
        for own in actions[: STEP + 2]:
            reached = first.step(own)
        state = json.loads(json.dumps(first.state_dict()))
        np.testing.assert_array_equal(second.load_state_dict(state)[0], reached[0])
        assert second.state_dict() == state
        for own in actions[STEP + 2 :]:
            assert_rows_equal(first.step(own), second.step(own), range(6))

    def test_a_repeated_action_counts_its_steps_as_the_other_rows_do(self, make_env):
        """Nine steps in decisions of four: four, four and one, whoever has started over between."""
        for fast in (True, False):
            exploding = make_env(partial(Exploding, "force"), fast=fast, action_repeat=4)
            exploding.reset()
            lengths = [exploding.step(own)[4]["episode_length"][[0, BROKEN]].tolist() for own in random_actions(3)]
            assert lengths == [[4, 4], [8, 4], [9, 5]]

    def test_an_action_that_is_not_finite_breaks_its_own_row_only(self, make_env):
        for fast in (True, False):
            broken, well = make_env(fast=fast), make_env(fast=fast)
            broken.reset()
            well.reset()
            actions = random_actions(4)
            for number, own in enumerate(actions):
                bad = own.copy()
                bad[BROKEN] = np.nan if number == 1 else own[BROKEN]
                given, expected = broken.step(bad), well.step(own)
                assert_rows_equal(given, expected, OTHERS)
                assert given[3][BROKEN] == (number == 1)
                assert np.isfinite(given[0]).all()

    def test_a_single_environment_is_truncated_too(self, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        env = MetaworldTaskEnv(TASK, num_goals=2)
        env.reset()
        blow_up(env._task.simulator()[1], "velocity")
        _, reward, terminated, truncated, _ = env.step(np.zeros(4, np.float32))
        assert math.isnan(reward)
        assert (terminated, truncated) == (False, True)
        env.reset()
        assert env.step(np.zeros(4, np.float32))[3] is False
        env.close()
        assert list(tmp_path.iterdir()) == []
        assert capfd.readouterr() == ("", "")
