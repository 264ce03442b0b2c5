"""Training and evaluation on a tiny world that gives numbers which are not finite: named, never stored, survived."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_checkpoint
from faulty_world import KINDS, faulty_envs, faulty_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_world import TinyVectorEnv, make_world, tiny_config, tiny_sac

from mtrl_imgrad import Config, train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.config import CheckpointConfig, EnvsConfig, EvalConfig, LogConfig, NetworkConfig, Sb3Config
from mtrl_imgrad.evaluation import evaluate
from mtrl_imgrad.faults import Faults, Transitions
from mtrl_imgrad.learner import Learner, NonFiniteError
from mtrl_imgrad.rewards import RewardNormalizer
from mtrl_imgrad.run import Run
from mtrl_imgrad.trainer import run_training

CPU = torch.device("cpu")
TASKS = ("east", "north", "west", "south")
ALGORITHMS = ("mtsac", "sb3-sac", "sb3-sac-single")
NEVER_ENDING = EvalConfig(every=0, final=False)


def short_config(run_dir: Path, policy: Any = "skip", algorithm: Any = "mtsac", **sections: Any) -> Config:
    """60 steps, the first 20 of them warm-up, in episodes of 10."""
    defaults: dict[str, Any] = {
        "algorithm": algorithm,
        "sac": tiny_sac(steps=60, warmup=20, batch_per_task=8, n_step=3, nan_policy=policy),
        "sb3": Sb3Config(batch_size=8, net_arch=(8,), buffer_size=400),
        "network": NetworkConfig(kind="multi_head", width=8, depth=1, observation_normalization=True),
        "envs": EnvsConfig(horizon=10, reward_normalization="ema"),
        "eval": NEVER_ENDING,
        "log": LogConfig(every=10, tensorboard=False),
    }
    if algorithm == "mtsac":
        defaults["aggregator"] = Mean()
    return tiny_config(run_dir, **(defaults | sections))


def saved(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(folder, CPU)[1]


def assert_all_finite(groups: dict[str, dict[str, torch.Tensor]]) -> None:
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            assert torch.isfinite(tensor.double()).all(), f"{group}: {name}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", KINDS)
class TestRaise:
    def test_the_run_ends_with_one_line_that_names_the_transition(self, tmp_path, kind, algorithm):
        config = short_config(tmp_path / "run", "raise", algorithm)
        row = 0 if algorithm == "sb3-sac-single" else 2
        world = faulty_world({44: (kind, [row])})
        with pytest.raises(NonFiniteError) as raised:
            train(config, make_world=world)
        task = TASKS[row]
        what = KINDS[kind][1] if algorithm == "mtsac" else re.sub(r"1e\+\d+", "inf", KINDS[kind][1])  # as float32
        told = rf"{task}, environment 0, goal \d, step 4: {re.escape(what)}. sac.nan_policy skip .*"
        assert re.fullmatch(told, str(raised.value))

    def test_the_checkpoint_before_it_stays_and_the_run_can_go_on(self, tmp_path, read_progress, kind, algorithm):
        config = short_config(tmp_path / "run", "raise", algorithm, checkpoint=CheckpointConfig(every=30))
        with pytest.raises(NonFiniteError):
            train(config, make_world=faulty_world({44: (kind, [0])}))
        assert load_checkpoint(tmp_path / "run", CPU)[0]["step"] == 30
        train(config, resume=tmp_path / "run", make_world=make_world)
        straight = train(replace(config, run_dir=str(tmp_path / "straight")), make_world=make_world)
        assert read_progress(tmp_path / "run") == read_progress(straight)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
class TestSkip:
    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_that_is_kept_is_ever_anything_but_finite(self, tmp_path, kind, algorithm):
        """Replay, networks, moments, reward and observation statistics, episode statistics."""
        faults = {step: (kind, [0]) for step in (2, 25, 30, 44, 45)}
        folder = train(short_config(tmp_path / "run", "skip", algorithm), make_world=faulty_world(faults))
        assert_all_finite(saved(folder))

    def test_it_is_told_once_a_log_row_and_counted(self, tmp_path, capsys, read_csv, algorithm):
        faults: dict[int, tuple[str, list[int]]] = {23: ("reward inf", [0])}
        faults |= {step: ("observation nan", [0]) for step in range(41, 50)}
        models = 4 if algorithm == "sb3-sac-single" else 1
        folder = train(short_config(tmp_path / "run", "skip", algorithm), make_world=faulty_world(faults))
        warnings = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
        assert len(warnings) == 2
        assert re.search(
            rf"^warning: transitions left out: {models} .*east, environment 0, goal \d, step 3: the reward is inf",
            warnings[0],
        )
        assert re.search(
            rf"^warning: transitions left out: {9 * models} .*step 1: the observation is not finite and 8 more of it",
            warnings[1],
        )
        counts = [float(row["rollout/non_finite"]) for row in read_csv(folder / "progress.csv")]
        assert counts == [models * count for count in (0, 0, 1, 1, 10, 10)]

    def test_cut_episodes_are_in_no_statistics(self, tmp_path, read_csv, algorithm):
        """Of east, one of four episodes ended early; its mean length is that of the others, or of what was left."""
        world = faulty_world({4: ("reward nan", [0])})
        folder = train(short_config(tmp_path / "run", "skip", algorithm), make_world=world)
        first, second, *_ = read_csv(folder / "progress.csv")
        assert float(first["rollout/ep_len_mean/east"]) == 6
        assert float(second["rollout/ep_len_mean/east"]) == 10
        if algorithm != "sb3-sac-single":
            assert float(first["rollout/ep_len_mean/north"]) == 10

    def test_a_world_that_gives_nothing_else_ends_the_run_where_it_would_learn(self, tmp_path, algorithm):
        world = faulty_world(
            {step: ("reward nan", [0, 1, 2, 3][: 1 if "single" in algorithm else 4]) for step in range(1, 61)}
        )
        config = short_config(tmp_path / "run", "skip", algorithm)
        with pytest.raises(NonFiniteError, match="nothing to learn from"):
            train(config, make_world=world)

    def test_one_task_that_gives_nothing_else_from_the_start_ends_it_too(self, tmp_path, algorithm):
        """Rings are written together: before a task has anything, the others cannot store either."""
        world = faulty_world({step: ("reward nan", [0]) for step in range(1, 61)})
        with pytest.raises(NonFiniteError, match="nothing to learn from"):
            train(short_config(tmp_path / "run", "skip", algorithm), make_world=world)

    def test_a_run_resumed_inside_of_an_episode_after_a_fault_is_that_without_a_stop(
        self, tmp_path, read_progress, algorithm
    ):
        """The resumed run's environments do not fail again; what they are restored to is the same."""
        whole = short_config(tmp_path / "straight", "skip", algorithm)
        world = faulty_world({25: ("reward nan", [0]), 32: ("observation inf", [0])})
        straight = train(whole, make_world=world)
        half = replace(whole, run_dir=str(tmp_path / "parts"), sac=replace(whole.sac, steps=37))
        train(half, make_world=world)
        resumed = train(replace(whole, run_dir=half.run_dir), resume=tmp_path / "parts", make_world=make_world)
        assert read_progress(straight)[4:] == read_progress(resumed)[-2:]
        ours, theirs = saved(straight), saved(resumed)
        for group, tensors in ours.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, theirs[group][name]), f"{group}: {name}"


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("algorithm", ["sb3-sac", "sb3-sac-single"])
def test_a_loss_of_sb3s_that_is_not_finite_ends_the_run_whatever_the_policy(tmp_path, algorithm, policy):
    """The reward is finite and its square is not; SB3 has stepped by the time that it tells."""
    world = partial(make_world, constant_reward=3e19)
    config = short_config(tmp_path / "run", policy, algorithm, envs=EnvsConfig(horizon=10))
    with pytest.raises(NonFiniteError, match=r"^train/critic_loss of stable-baselines3's SAC is inf\.$"):
        train(config, make_world=world)


def test_an_action_that_is_not_finite_is_left_out_and_the_run_can_be_resumed(tmp_path, monkeypatch, capsys):
    """In its own row, at step 35 of 37: the checkpoint is inside of the episode that started over."""
    act, calls = Learner.act, [0]

    def broken(learner, observations, noise):
        calls[0] += 1
        actions = act(learner, observations, noise)
        actions[2] = torch.nan if calls[0] == 15 else actions[2]
        return actions

    monkeypatch.setattr(Learner, "act", broken)
    half = short_config(tmp_path / "run")
    train(replace(half, sac=replace(half.sac, steps=37)), make_world=make_world)
    assert "west, environment 0, goal" in (said := capsys.readouterr().out)
    assert "step 5: the policy's action is not finite" in said
    assert saved(tmp_path / "run")["replay"]["repeated"].nonzero().tolist() == [[34, 2, 0]]
    train(half, resume=tmp_path / "run", make_world=make_world)
    assert_all_finite(saved(tmp_path / "run"))


class TestReplay:
    def test_the_slot_of_a_broken_transition_repeats_the_one_before_and_no_window_crosses_it(self, tmp_path):
        folder = train(short_config(tmp_path / "run"), make_world=faulty_world({14: ("reward nan", [1])}))
        rings = saved(folder)["replay"]
        assert rings["repeated"].nonzero().tolist() == [[13, 1, 0]]
        for name in ("observations", "actions", "rewards", "next_observations", "terminated"):
            assert torch.equal(rings[name][13, 1], rings[name][12, 1]), name
        assert rings["ended"][:20, 1, 0].nonzero().flatten().tolist() == [9, 13, 19]
        assert rings["ended"][:20, 0, 0].nonzero().flatten().tolist() == [9, 19]
        with Run(short_config(tmp_path / "run"), tmp_path / "run", make_world) as run:
            starts = torch.tensor([[[11, 12, 13, 14]] * 4, [[0] * 4] * 4])
            discounts = run.replay.gather(starts).discounts
        assert discounts[1].tolist() == pytest.approx([0.9**2, 0.9, 0.9, 0.9**3])
        assert discounts[0].tolist() == pytest.approx([0.9**3] * 4)

    def test_the_other_tasks_rings_are_those_of_a_world_without_faults(self, tmp_path):
        """During the warm-up, when the actions do not depend on anything learned."""
        config = short_config(tmp_path / "well", sac=tiny_sac(steps=40, warmup=40))
        well = saved(train(config, make_world=make_world))["replay"]
        config = replace(config, run_dir=str(tmp_path / "hurt"), sac=replace(config.sac, nan_policy="skip"))
        hurt = saved(train(config, make_world=faulty_world({13: ("observation nan", [2])})))["replay"]
        for name, ring in well.items():
            assert torch.equal(ring[:, [0, 1, 3]], hurt[name][:, [0, 1, 3]]), name
            assert torch.equal(ring[:12], hurt[name][:12]), name

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        faults=st.dictionaries(
            st.integers(1, 30),
            st.tuples(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True)),
            max_size=12,
        ),
        pipeline=st.booleans(),
        policy=st.sampled_from(["raise", "skip"]),
    )
    def test_whatever_the_environments_give_the_rings_stay_finite(self, tmp_path_factory, faults, pipeline, policy):
        config = short_config(
            tmp_path_factory.mktemp("property") / "run",
            envs=EnvsConfig(horizon=10, envs_per_task=2, pipeline=pipeline, reward_normalization="ema"),
            sac=tiny_sac(steps=60, warmup=20, batch_per_task=4, n_step=2, nan_policy=policy),
            checkpoint=CheckpointConfig(replay=False),
        )
        with Run(config, make_world=faulty_world(faults)) as run:
            if policy == "raise" and faults:
                with pytest.raises(NonFiniteError):
                    run_training(run)
            else:
                run_training(run)
                assert run.faults.count == sum(len(rows) for _, rows in faults.values())
            groups = {name: part.state_dict() for name, part in run._saved().items() if name != "generators"}
            assert_all_finite(groups | {"replay": run.replay.rings()})
            assert torch.isfinite(run.observations).all()


class TestWhatIsFound:
    @staticmethod
    def transitions(**fields: Any) -> Transitions:
        infos = {"goal": np.arange(4), "episode_length": np.arange(4) + 10}
        values = {"actions": np.zeros((4, 2)), "rewards": np.zeros(4), "final_observations": np.zeros((4, 3))}
        return Transitions(("a", "b"), **(values | {"infos": infos} | fields))

    def test_finite_ones_are_fine(self):
        transitions = self.transitions()
        assert not transitions.broken().any()
        assert transitions.faults(transitions.broken()) == []

    @pytest.mark.parametrize(
        ("field", "told"),
        [
            ("actions", "the policy's action is not finite"),
            ("rewards", "the reward is 1e+39"),
            ("final_observations", "the observation is not finite"),
            ("unstable", "MuJoCo's simulation became unstable"),
        ],
    )
    def test_each_is_named_with_task_environment_goal_and_step(self, field, told):
        if field == "unstable":
            transitions = self.transitions()
            transitions.infos["unstable"] = np.array([False, False, False, True])
        else:
            transitions = self.transitions()
            getattr(transitions, field)[3] = 1e39  # finite in float64, infinite where it would be stored
        assert transitions.broken().tolist() == [False, False, False, True]
        (fault,) = transitions.faults(transitions.broken())
        assert str(fault) == f"b, environment 1, goal 3, step 13: {told}"

    def test_the_normaliser_takes_in_finite_rewards_only(self):
        hurt, well = RewardNormalizer(2, 0.1), RewardNormalizer(2, 0.1)
        for rewards in ([1.0, 2.0], [3.0, 4.0]):
            well(np.array(rewards))
            hurt(np.array(rewards))
            result = hurt(np.array([np.nan, np.inf]))
            assert not np.isfinite(result).any()
        np.testing.assert_array_equal([hurt.mean, hurt.variance], [well.mean, well.variance])

    def test_a_variance_that_has_decayed_to_nothing_gives_no_warning_and_no_number(self):
        normalizer = RewardNormalizer(1, 0.5)
        normalizer.variance[:] = 0.0
        assert np.isnan(normalizer(np.zeros(1))[0])

    def test_under_raise_the_first_one_ends_the_run_and_none_is_counted(self):
        transitions = self.transitions(rewards=np.array([0.0, np.nan, np.nan, 0.0]))
        faults = Faults("raise")
        with pytest.raises(NonFiniteError, match=r"^a, environment 1, goal 1, step 11: the reward is nan\. sac"):
            faults.take(transitions.faults(transitions.broken()))
        assert (faults.count, faults.told()) == (0, None)

    @pytest.mark.parametrize("algorithm", ["mtsac", "sb3-sac"])
    def test_an_environment_that_does_not_start_over_ends_the_run_whatever_the_policy(self, tmp_path, algorithm):
        def world(config, description):
            made = make_world(config, description)

            def training(*arguments):
                envs: Any = made.training(*arguments)
                observe, calls = envs._observe, [0]

                def broken():
                    calls[0] += 1
                    return observe() * (np.nan if calls[0] > 30 else 1)

                envs._observe = broken
                return envs

            return replace(made, training=training)

        with pytest.raises(NonFiniteError, match="east, environment 0: an episode begins or goes on with"):
            train(short_config(tmp_path / "run", "skip", algorithm), make_world=world)


class TestEvaluation:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("algorithm", ["mtsac", "sb3-sac"])
    def test_the_episode_has_failed_with_the_return_so_far_and_the_others_are_as_ever(
        self, tmp_path, read_csv, capsys, kind, algorithm
    ):
        """Whatever the policy of training: here step 4 of the second episode of north."""
        config = short_config(
            tmp_path / "well", "raise", algorithm, eval=EvalConfig(every=30, goals_per_task=3, horizon=10)
        )
        well = train(config, make_world=make_world)
        capsys.readouterr()
        world = faulty_world(evaluation={14: (kind, [1])})
        hurt = train(replace(config, run_dir=str(tmp_path / "hurt")), make_world=world)
        fault = f"north, environment 0, goal 4, step 4: {KINDS[kind][1]}"
        told = f"warning: evaluation episodes that ended early and count as failed: 1 ({fault})"
        said = capsys.readouterr()
        assert (said.out + said.err).splitlines().count(told) == 1
        expected, rows = read_csv(well / "eval_training.csv"), read_csv(hurt / "eval_training.csv")
        assert [row for row in rows if row not in expected] == [rows[4]]
        assert (rows[4]["task"], rows[4]["success"], rows[4]["steps_to_success"]) == ("north", "0", "-1")
        assert 0 > float(rows[4]["return"]) > float(expected[4]["return"])

    def test_a_success_before_the_fault_does_not_count(self):
        envs = faulty_envs(TinyVectorEnv(TASKS, 10, 0, horizon=10), {9: ("reward nan", [0])})
        directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])[:, None]

        def walk(observations: torch.Tensor) -> torch.Tensor:
            return ((observations[..., 2:] * directions - observations[..., :2]) / 0.2).clamp(-1, 1)

        told: list[str] = []
        rows = evaluate(
            walk, envs, TASKS, np.array([3]), 0, short_config(Path("unused"), eval=EvalConfig(horizon=10)), told.append
        )
        assert [row.success for row in rows] == [0, 1, 1, 1]
        assert len(told) == 1
