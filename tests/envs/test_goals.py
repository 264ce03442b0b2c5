from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from mtrl_imgrad.envs import MT10, Goals, make_goals


def test_goals_of_mt10_are_metaworlds_to_the_byte(mt10_goals, metaworld_mt10):
    for task, env in zip(MT10, metaworld_mt10.envs, strict=True):
        assert mt10_goals.metaworld_tasks(task) == env.get_wrapper_attr("tasks")


def test_goals_of_other_lists_are_those_of_mt1():
    import metaworld

    goals = make_goals(["window-close-v3", "faucet-open-v3"], goal_seed=11)
    for task in goals.tasks:
        assert goals.metaworld_tasks(task) == metaworld.MT1(task, seed=11).train_tasks


def test_goals_of_a_set_depend_on_the_tasks_before(mt10_goals):
    alone = make_goals(["reach-v3", "push-v3"], goal_seed=mt10_goals.goal_seed)
    np.testing.assert_array_equal(alone.vectors["reach-v3"], mt10_goals.vectors["reach-v3"])
    assert not np.array_equal(alone.vectors["push-v3"], mt10_goals.vectors["push-v3"])


def test_num_goals_keeps_the_first_ones(mt10_goals):
    one = make_goals(["reach-v3"], goal_seed=mt10_goals.goal_seed, num_goals=1)
    assert one.num_goals == 1
    np.testing.assert_array_equal(one.vectors["reach-v3"], mt10_goals.vectors["reach-v3"][:1])


def test_seeds_give_different_goals_and_leave_numpys_global_generator_alone():
    before = pickle.dumps(np.random.get_state())  # noqa: NPY002
    first, second = (make_goals(["reach-v3"], goal_seed=seed).vectors["reach-v3"] for seed in (1, 2))
    assert pickle.dumps(np.random.get_state()) == before  # noqa: NPY002
    assert not np.array_equal(first, second)


def test_goals_survive_json_exactly(mt10_goals):
    restored = Goals.from_dict(json.loads(json.dumps(mt10_goals.to_dict())))
    assert (restored.tasks, restored.goal_seed, restored.num_goals) == (MT10, mt10_goals.goal_seed, 50)
    assert restored.metaworld_tasks("push-v3") == mt10_goals.metaworld_tasks("push-v3")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        pytest.param({"goal_seed": -1}, "goal_seed", id="negative seed"),
        pytest.param({"goal_seed": 2**32}, "goal_seed", id="seed too large for numpy's global generator"),
        pytest.param({"goal_seed": 0, "num_goals": 0}, "num_goals", id="no goal"),
        pytest.param({"goal_seed": 0, "num_goals": 51}, "num_goals", id="more goals than Meta-World has"),
    ],
)
def test_values_out_of_range_are_named(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        make_goals(["reach-v3"], **arguments)
