"""A loaded agent is the policy that was evaluated, with stable-baselines3's predict."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.policies import BasePolicy
from tiny_world import TinyVectorEnv, make_world, tiny_config, tiny_sac

import mtrl_imgrad
from mtrl_imgrad import train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.config import EvalConfig, NetworkConfig

TASKS = ("east", "north", "west", "south")


@pytest.fixture(scope="module", params=["mlp", "multi_head"])
def run(request, tmp_path_factory) -> Path:
    """A run with everything that a policy has to apply: task identity, observation statistics, a shared encoder."""
    network = NetworkConfig(
        kind=request.param, width=16, depth=2, share_encoder=True, observation_normalization=True, layer_norm="affine"
    )
    config = tiny_config(
        tmp_path_factory.mktemp("agent") / "run",
        aggregator=Mean(),
        network=network,
        sac=tiny_sac(steps=200, warmup=100, batch_per_task=16),
        eval=EvalConfig(every=0, horizon=10),
    )
    return train(config, make_world=make_world)


class TestLoad:
    def test_the_loaded_agent_repeats_the_evaluation(self, run, read_csv):
        """Each task's own policy, through predict, gives the returns that the training process wrote."""
        agent = mtrl_imgrad.load(run)
        assert (agent.tasks, agent.step) == (TASKS, 200)
        policies = [agent.policy(task) for task in TASKS]
        rows = {(row["task"], int(row["goal"])): row for row in read_csv(run / "eval.csv")}
        assert len(rows) == 40
        envs = TinyVectorEnv(TASKS, 10, 0, horizon=10)
        observations, _ = envs.reset(options={"goals": np.tile(np.arange(10), (4, 1))})
        for goal in range(10):
            for _ in range(10):
                pairs = zip(policies, observations, strict=True)
                actions = [policy.predict(x, deterministic=True)[0] for policy, x in pairs]
                observations, _, _, _, infos = envs.step(np.stack(actions))
            for k, task in enumerate(TASKS):
                assert infos["episode_return"][k] == pytest.approx(float(rows[task, goal]["return"]), abs=1e-5)
                assert int(infos["success"][k]) == int(rows[task, goal]["success"])

    def test_a_string_is_as_good_as_a_path(self, run):
        assert mtrl_imgrad.load(str(run)).step == 200

    def test_a_folder_that_is_no_run(self, tmp_path):
        with pytest.raises(ValueError, match="no run folder"):
            mtrl_imgrad.load(tmp_path)

    def test_the_replay_is_not_needed(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "copy")
        for path in (tmp_path / "copy" / "checkpoints" / "0000000200").glob("replay-*"):
            path.unlink()
        assert mtrl_imgrad.load(tmp_path / "copy").tasks == TASKS


class TestPredict:
    observations = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)

    def test_it_has_the_signature_of_stable_baselines3(self):
        theirs = inspect.signature(BasePolicy.predict).parameters
        ours = inspect.signature(mtrl_imgrad.Policy.predict).parameters
        assert list(theirs) == list(ours) == ["self", "observation", "state", "episode_start", "deterministic"]
        assert all(theirs[name].default == ours[name].default for name in ours)

    def test_one_observation_gives_one_action_and_several_give_several(self, run):
        policy = mtrl_imgrad.load(run).policy("west")
        batch, state = policy.predict(self.observations, deterministic=True)
        assert (batch.shape, batch.dtype, state) == ((5, 2), np.float32, None)
        for observation, expected in zip(self.observations, batch, strict=True):
            action, state = policy.predict(observation, deterministic=True)
            assert (action.shape, state) == ((2,), None)
            np.testing.assert_allclose(action, expected, rtol=0, atol=1e-6)

    def test_actions_are_within_their_bounds(self, run):
        for deterministic in (True, False):
            actions, _ = (
                mtrl_imgrad.load(run).policy("west").predict(1e3 * self.observations, None, None, deterministic)
            )
            assert (np.abs(actions) <= 1).all()

    def test_a_deterministic_action_is_always_the_same_and_a_sampled_one_is_not(self, run):
        policy = mtrl_imgrad.load(run).policy("north")
        same = [policy.predict(self.observations, deterministic=True)[0] for _ in range(2)]
        sampled = [policy.predict(self.observations)[0] for _ in range(2)]
        assert np.array_equal(*same)
        assert not np.array_equal(*sampled)

    def test_sampling_repeats_itself_after_loading_again(self, run):
        first, second = (mtrl_imgrad.load(run).policy("north").predict(self.observations)[0] for _ in range(2))
        assert np.array_equal(first, second)

    def test_sampling_leaves_torchs_global_generator_alone(self, run):
        policy = mtrl_imgrad.load(run).policy("north")
        before = torch.get_rng_state()
        policy.predict(self.observations)
        assert torch.equal(before, torch.get_rng_state())

    def test_the_task_matters(self, run):
        agent = mtrl_imgrad.load(run)
        actions = [agent.policy(task).predict(self.observations, deterministic=True)[0] for task in TASKS]
        for k in range(3):
            assert np.abs(actions[k] - actions[k + 1]).max() > 1e-3

    def test_float64_and_lists_are_taken(self, run):
        policy = mtrl_imgrad.load(run).policy("east")
        expected, _ = policy.predict(self.observations[0], deterministic=True)
        for given in (self.observations[0].astype(np.float64), self.observations[0].tolist()):
            np.testing.assert_array_equal(policy.predict(given, deterministic=True)[0], expected)

    def test_an_observation_is_not_changed(self, run):
        given = self.observations.copy()
        mtrl_imgrad.load(run).policy("east").predict(given, deterministic=True)
        np.testing.assert_array_equal(given, self.observations)

    def test_an_unknown_task_is_told_with_the_nearest_one(self, run):
        with pytest.raises(ValueError, match="task: 'nort' is not one of this agent's 4; the nearest is 'north'"):
            mtrl_imgrad.load(run).policy("nort")
