"""The training loop on the tiny world: it learns, it counts, it repeats itself, and it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_checkpoint
from tiny_world import make_world, tiny_config, tiny_sac

from mtrl_imgrad import Config, train
from mtrl_imgrad.aggregators import IMGrad, Mean
from mtrl_imgrad.config import CheckpointConfig, EnvsConfig, EvalConfig, LogConfig, NetworkConfig
from mtrl_imgrad.learner import Learner, NonFiniteError
from mtrl_imgrad.run import Run
from mtrl_imgrad.trainer import run_training

CPU = torch.device("cpu")
TASKS = 4
HUGE = 3e19
"""A reward whose square, and so the loss of the critics, is infinite in float32."""


def short_config(run_dir: Path | str, **sections) -> Config:
    """A short run with updates, evaluations and several log rows."""
    defaults = {
        "aggregator": Mean(),
        "sac": tiny_sac(steps=120, warmup=40, batch_per_task=16),
        "network": NetworkConfig(kind="multi_head", width=16, depth=2, observation_normalization=True),
        "eval": EvalConfig(every=40, goals_per_task=3, horizon=10),
        "log": LogConfig(every=20, tensorboard=False),
    }
    return tiny_config(run_dir, **(defaults | sections))


def final_success(read_csv, folder: Path) -> float:
    return float(np.mean([float(row["success"]) for row in read_csv(folder / "eval.csv")]))


def replay_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder, CPU)[1]["replay"]


class TestLearning:
    @pytest.mark.parametrize("rule", [Mean(), IMGrad()], ids=["mean", "imgrad"])
    def test_the_tiny_world_is_learned(self, tmp_path, read_csv, rule):
        folder = train(tiny_config(tmp_path / "run", aggregator=rule), make_world=make_world)
        rows = read_csv(folder / "eval.csv")
        assert len(rows) == 4 * 10
        assert final_success(read_csv, folder) >= 0.9

    def test_a_task_blind_network_cannot_learn_opposite_tasks(self, tmp_path, read_csv):
        """So it is the task's identity that the test above needs."""
        blind = NetworkConfig(kind="mlp", task_input="none", width=64, depth=2)
        folder = train(tiny_config(tmp_path / "run", aggregator=Mean(), network=blind), make_world=make_world)
        assert final_success(read_csv, folder) <= 0.3

    @pytest.mark.parametrize(("terminates", "value"), [(False, 2.0), (True, 1.0)], ids=["truncation", "termination"])
    def test_a_truncation_bootstraps_and_a_termination_does_not(self, tmp_path, read_csv, terminates, value):
        """Reward 1 in episodes of one step, gamma 1/2: the value is 1 / (1 - gamma) where the end is only of the
        episode, and 1 where it is of the world. The temperature is negligible."""
        config = tiny_config(
            tmp_path / "run",
            aggregator=Mean(),
            envs=EnvsConfig(horizon=1),
            eval=EvalConfig(every=0, goals_per_task=1, horizon=1),
            sac=tiny_sac(steps=500, warmup=50, gamma=0.5, tau=0.1, initial_temperature=1e-6, temperature_lr=1e-9),
        )
        folder = train(config, make_world=partial(make_world, constant_reward=1.0, terminates=terminates))
        assert float(read_csv(folder / "progress.csv")[-1]["train/q_mean"]) == pytest.approx(value, abs=0.05)


class TestRepeatability:
    def test_the_same_seed_gives_the_same_numbers(self, tmp_path, read_progress):
        first, second = (train(short_config(tmp_path / name), make_world=make_world) for name in ("a", "b"))
        assert len(read_progress(first)) == 6
        assert read_progress(first) == read_progress(second)
        for name in ("eval.csv", "eval_training.csv"):
            assert (first / name).read_bytes() == (second / name).read_bytes()

    def test_another_seed_gives_other_numbers(self, tmp_path, read_progress):
        first, second = (
            read_progress(train(short_config(tmp_path / str(seed), seed=seed), make_world=make_world))
            for seed in (1, 2)
        )
        for row, other in zip(first, second, strict=True):
            assert row["rollout/ep_rew_mean"] != other["rollout/ep_rew_mean"]

    def test_numbers_do_not_depend_on_torchs_global_generator(self, tmp_path, read_progress):
        folders = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            folders.append(train(short_config(tmp_path / str(seed)), make_world=make_world))
        assert read_progress(folders[0]) == read_progress(folders[1])

    def test_evaluation_leaves_the_training_stream_alone(self, tmp_path, read_progress):
        """Training rows are equal whether there are evaluations or not."""
        with_eval = read_progress(train(short_config(tmp_path / "with"), make_world=make_world))
        no_eval = EvalConfig(every=0, goals_per_task=3, horizon=10, final=False)
        without = read_progress(train(short_config(tmp_path / "without", eval=no_eval), make_world=make_world))
        assert any(row["eval/success_rate"] for row in with_eval)
        stripped = [{tag: x for tag, x in row.items() if not tag.startswith("eval/")} for row in with_eval]
        assert stripped == without


class TestResume:
    """That the numbers are the same is tested in `test_exact_resume`."""

    def test_the_run_folder_is_that_of_the_first_part(self, tmp_path):
        config = short_config(tmp_path / "run", sac=tiny_sac(steps=60, warmup=40, batch_per_task=16))
        train(config, make_world=make_world)
        train(short_config(tmp_path / "run"), resume=tmp_path / "run", make_world=make_world)
        assert len((tmp_path / "run" / "command.txt").read_text().splitlines()) == 2
        assert (tmp_path / "run" / "goals.json").read_text() == '{"world": "tiny", "made": 1}'

    def test_a_finished_run_can_be_resumed_without_training(self, tmp_path, read_progress):
        config = short_config(tmp_path / "run")
        train(config, make_world=make_world)
        before = read_progress(tmp_path / "run"), (tmp_path / "run" / "eval.csv").read_bytes()
        train(config, resume=tmp_path / "run", make_world=make_world)
        assert (read_progress(tmp_path / "run"), (tmp_path / "run" / "eval.csv").read_bytes()) == before

    def test_without_the_replay_it_is_refused(self, tmp_path):
        config = short_config(tmp_path / "run", checkpoint=CheckpointConfig(replay=False))
        train(config, make_world=make_world)
        with pytest.raises(ValueError, match=r"checkpoint\.replay"):
            train(config, resume=tmp_path / "run", make_world=make_world)


class TestCounting:
    """Every interval is in simulator steps per task."""

    @pytest.mark.parametrize(
        ("envs_per_task", "action_repeat"), [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda value: str(value)
    )
    def test_a_vector_step_counts_environments_and_repeated_actions(
        self, tmp_path, read_csv, envs_per_task, action_repeat
    ):
        envs = EnvsConfig(horizon=10, envs_per_task=envs_per_task, action_repeat=action_repeat)
        with Run(short_config(tmp_path / "run", envs=envs), make_world=make_world) as run:
            run_training(run)
            assert run.envs.steps_taken * envs_per_task == 120
            decisions = 120 // (envs_per_task * action_repeat)
            assert run.replay.written == decisions
        rows = read_csv(tmp_path / "run" / "progress.csv")
        assert [int(row["step"]) for row in rows] == [20, 40, 60, 80, 100, 120]
        assert [float(row["rollout/transitions"]) for row in rows] == [int(row["step"]) * TASKS for row in rows]
        warmup = 40 // (envs_per_task * action_repeat)
        assert float(rows[-1]["train/updates"]) == decisions - warmup
        assert {float(row["rollout/ep_len_mean"]) for row in rows if row["rollout/ep_len_mean"]} == {10.0}

    def test_the_final_steps_are_reported_where_the_interval_does_not_divide(self, tmp_path, read_csv):
        config = short_config(tmp_path / "run", log=LogConfig(every=50, tensorboard=False), eval=EvalConfig(every=0))
        train(config, make_world=make_world)
        assert [row["step"] for row in read_csv(tmp_path / "run" / "progress.csv")] == ["50", "100", "120"]

    @pytest.mark.parametrize("updates", [1, 3])
    def test_updates_per_step(self, tmp_path, read_csv, updates):
        config = short_config(
            tmp_path / "run", sac=tiny_sac(steps=60, warmup=40, batch_per_task=8, updates_per_step=updates)
        )
        train(config, make_world=make_world)
        assert float(read_csv(tmp_path / "run" / "progress.csv")[-1]["train/updates"]) == 20 * updates

    def test_checkpoints_are_taken_when_they_are_due(self, tmp_path, monkeypatch):
        """Every 25 steps, whatever the episodes are, and at the end."""
        saved = []
        save = Run.save
        monkeypatch.setattr(Run, "save", lambda self, step, **how: (saved.append(step), save(self, step, **how)))
        train(short_config(tmp_path / "run", checkpoint=CheckpointConfig(every=25)), make_world=make_world)
        assert saved == [25, 50, 75, 100, 120]
        names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert names == ["0000000100", "0000000120", "best"]


class TestWarmup:
    def test_actions_are_uniform_and_nothing_is_learned(self, tmp_path, read_csv):
        steps = 300
        config = short_config(tmp_path / "run", sac=tiny_sac(steps=steps, warmup=steps))
        folder = train(config, make_world=make_world)
        actions = replay_of(folder)["actions"].flatten()
        assert actions.min() >= -1
        assert actions.max() <= 1
        histogram = torch.histc(actions, 10, -1, 1) / len(actions)
        # 2400 draws: the standard deviation of a bin's share is 0.006.
        assert histogram.tolist() == pytest.approx([0.1] * 10, abs=0.03)
        assert float(read_csv(folder / "progress.csv")[-1]["train/updates"]) == 0

    def test_actions_come_from_the_policy_afterwards(self, tmp_path):
        """A policy whose standard deviation is clipped to almost nothing does the same in the same state."""
        network = NetworkConfig(kind="multi_head", width=16, depth=2, log_std_min=-20.0, log_std_max=-19.0)
        sac = tiny_sac(steps=60, warmup=31, batch_per_task=8, actor_lr=1e-12, critic_lr=1e-12)
        config = short_config(tmp_path / "run", network=network, sac=sac)
        replay = replay_of(train(replace(config, benchmark=replace(config.benchmark, goals=1)), make_world=make_world))
        first_actions = replay["actions"][::10]  # of the episodes, which all start at the origin
        torch.testing.assert_close(first_actions[4], first_actions[5], rtol=0, atol=1e-6)
        # Step 31 is the last of the warm-up.
        for random in first_actions[:4]:
            assert (random - first_actions[4]).abs().amax(-1).min() > 1e-2


class TestRandomStarts:
    @pytest.mark.parametrize("pipeline", [False, True])
    def test_every_episode_but_the_first_begins_with_up_to_so_many_random_decisions(
        self, tmp_path, monkeypatch, pipeline
    ):
        """The policy's decisions are told by being 0.5."""
        monkeypatch.setattr(Learner, "act", lambda self, rows, noise: torch.full((*rows.shape[:2], 2), 0.5))
        envs = EnvsConfig(horizon=10, envs_per_task=2, pipeline=pipeline, workers=0)
        sac = tiny_sac(steps=400, warmup=0, batch_per_task=16, random_start=3)
        replay = replay_of(train(short_config(tmp_path / "run", sac=sac, envs=envs), make_world=make_world))
        random = (replay["actions"][:200] != 0.5).all(-1).unflatten(0, (20, 10))  # episodes, decisions, tasks, envs
        counts = random.sum(1)
        assert not counts[0].any()
        assert set(counts[1:].unique().tolist()) == {0, 1, 2, 3}
        assert (random.int().diff(dim=1) <= 0).all(), "they come first"


class TestCorrelatedNoise:
    """Lag-1 correlation, within episodes of 10, of the normal numbers behind the decisions: 7,200 pairs, so that its
    standard deviation is 0.012."""

    envs = EnvsConfig(horizon=10, envs_per_task=4)
    none = EvalConfig(every=0, final=False)

    def lag_1(self, folder: Path, normal: Callable[[torch.Tensor], torch.Tensor]) -> float:
        actions = replay_of(folder)["actions"][:250].double().clamp(-0.999999, 0.999999)
        episodes = normal(actions).unflatten(0, (25, 10))
        return float((episodes[:, 1:] * episodes[:, :-1]).mean() / episodes.square().mean())

    @pytest.mark.parametrize("rho", [0.0, 0.7])
    def test_the_policys_decisions_have_it(self, tmp_path, monkeypatch, rho):
        """Those of a policy with mean 0 and standard deviation 1."""
        monkeypatch.setattr(Learner, "act", lambda self, rows, noise: noise.tanh())
        sac = tiny_sac(steps=1000, warmup=0, batch_per_task=1, noise_correlation=rho)
        folder = train(short_config(tmp_path / "run", envs=self.envs, sac=sac, eval=self.none), make_world=make_world)
        assert self.lag_1(folder, torch.atanh) == pytest.approx(rho, abs=0.05)

    @pytest.mark.parametrize("rho", [0.0, 0.7])
    def test_random_starts_have_it(self, tmp_path, rho):
        """Of up to 1,000 decisions, so that almost all of episodes of 10 are random ones."""
        sac = tiny_sac(steps=1000, warmup=1000, noise_correlation=rho, random_start=1000)
        folder = train(short_config(tmp_path / "run", envs=self.envs, sac=sac, eval=self.none), make_world=make_world)
        # The first episode has none.
        assert self.lag_1(folder, torch.erfinv) == pytest.approx(24 / 25 * rho, abs=0.05)


class TestScalingByReturns:
    @pytest.mark.parametrize("measure", ["largest", "rms"])
    def test_returns_begin_anew_with_each_episode(self, tmp_path, measure):
        """Reward 1 in episodes of 10 steps, of which there are 12: G is (1 - gamma^i) / (1 - gamma) after i steps."""
        sac = tiny_sac(steps=120, warmup=40, batch_per_task=8, gamma=0.9, return_scaling=measure)
        folder = train(short_config(tmp_path / "run", sac=sac), make_world=partial(make_world, constant_reward=1.0))
        returns = (1 - 0.9 ** np.arange(1, 11)) / (1 - 0.9)
        expected = returns.max() if measure == "largest" else np.sqrt((returns**2).mean())
        found = load_checkpoint(folder, CPU)[1]["learner"]["return_size"]
        assert found.tolist() == pytest.approx([expected] * TASKS)


class TestStoredTransitions:
    def test_the_next_observation_is_the_final_one_where_an_episode_ends(self, tmp_path):
        replay = replay_of(train(short_config(tmp_path / "run"), make_world=make_world))
        ended, observations, following = (replay[name] for name in ("ended", "observations", "next_observations"))
        assert ended[:, 0, 0].nonzero().flatten().tolist() == list(range(9, 120, 10))
        starts = torch.arange(10, 120, 10)
        # The next episode starts at the origin; the stored next observation is where the point really was.
        assert (observations[starts][..., :2] == 0).all()
        assert (following[starts - 1][..., :2].norm(dim=-1) > 0).all()
        inside = ~ended[:-1, 0, 0]
        assert torch.equal(following[:-1][inside], observations[1:][inside])
        moved = following[..., :2] - observations[..., :2]
        clipped = observations[..., :2].abs().amax(-1) + 0.2 > 1.5  # the border of the plane
        torch.testing.assert_close(moved[~clipped], 0.2 * replay["actions"][~clipped], rtol=0, atol=1e-6)

    def test_rewards_of_repeated_actions_are_summed(self, tmp_path):
        envs = EnvsConfig(horizon=10, action_repeat=4)
        world = partial(make_world, constant_reward=1.0)
        rewards = replay_of(train(short_config(tmp_path / "run", envs=envs), make_world=world))["rewards"]
        assert rewards[:6, 0, 0].tolist() == [4, 4, 2, 4, 4, 2]


class TestFailures:
    def test_a_run_folder_in_use_is_refused(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"run_dir: .*--resume"):
            train(short_config(tmp_path / "run"), make_world=make_world)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]

    def test_a_folder_is_numbered_where_its_name_is_taken(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = short_config("", sac=tiny_sac(steps=20, warmup=20), eval=EvalConfig(final=False))
        folders = [train(config, make_world=make_world) for _ in range(2)]
        assert [str(folder) for folder in folders] == ["runs/4tasks-mean-s1", "runs/4tasks-mean-s1-2"]

    def test_a_replay_that_does_not_fit_is_refused_before_anything_is_written(self, tmp_path):
        config = short_config(tmp_path / "run")
        with pytest.raises(MemoryError, match=r"replay\.capacity: .*GiB"):
            train(replace(config, replay=replace(config.replay, capacity=10**13)), make_world=make_world)
        assert not (tmp_path / "run").exists()

    def test_non_finite_losses_end_the_run_at_a_log_row_with_task_and_loss(self, tmp_path, read_csv):
        broken = partial(make_world, constant_reward=HUGE)
        with pytest.raises(NonFiniteError, match=r"critic loss of east: \d+; .*sac\.nan_policy skip"):
            train(short_config(tmp_path / "run"), make_world=broken)
        rows = read_csv(tmp_path / "run" / "progress.csv")
        counts = [float(row["train/non_finite"]) for row in rows]
        assert counts[-1] > 0
        assert not any(counts[:-1])

    def test_no_checkpoint_is_saved_of_losses_that_are_to_end_the_run(self, tmp_path):
        """A resume takes what a checkpoint counted for told."""
        config = short_config(tmp_path / "run", log=LogConfig(every=1000, tensorboard=False))
        config = replace(config, checkpoint=CheckpointConfig(every=5))
        with pytest.raises(NonFiniteError, match="critic loss of east"):
            train(config, make_world=partial(make_world, constant_reward=HUGE))
        with pytest.raises(NonFiniteError, match="critic loss of east"):
            train(config, resume=tmp_path / "run", make_world=partial(make_world, constant_reward=HUGE))

    def test_a_resume_in_another_world_is_refused(self, tmp_path):
        """Other goals are known by what goals.json says, another simulator by where it goes on."""
        config = short_config(tmp_path / "run", sac=tiny_sac(steps=45, warmup=40))
        train(config, make_world=make_world)
        longer = replace(config, sac=replace(config.sac, steps=80))

        def moved(config, description):
            world = make_world(config, description)
            return replace(world, description=world.description | {"goals": "others"})

        with pytest.raises(ValueError, match=r"'world' is .* and must be"):
            Run(longer, tmp_path / "run", moved)

        def drifting(config, description):
            world = make_world(config, description)

            def training(stream, tasks):
                envs: Any = world.training(stream, tasks)
                load = envs.load_state_dict
                envs.load_state_dict = lambda state: (load(state)[0] + [[0], [0], [1e-6], [0]], {})
                return envs

            return replace(world, training=training)

        with pytest.raises(ValueError, match="its episode of west is not the one that the environment goes on with"):
            Run(longer, tmp_path / "run", drifting)

    def test_non_finite_numbers_from_before_a_resume_do_not_end_the_run_again(self, tmp_path):
        skip = short_config(tmp_path / "run", sac=tiny_sac(steps=80, warmup=40, nan_policy="skip"))
        train(skip, make_world=partial(make_world, constant_reward=HUGE))
        longer = replace(skip, sac=replace(skip.sac, steps=80 + 40, nan_policy="raise"))
        with Run(longer, tmp_path / "run", make_world) as run:
            assert run.learner.non_finite.any()
            run.log.tell_non_finite(run.learner.non_finite, run.tasks, "raise")
            run.learner.non_finite[1, 0] += 1
            with pytest.raises(NonFiniteError, match=r"\(actor loss of \w+: 1\)"):
                run.log.tell_non_finite(run.learner.non_finite, run.tasks, "raise")

    def test_with_skip_non_finite_losses_are_told_with_task_and_loss_and_change_nothing(self, tmp_path, capsys):
        config = short_config(tmp_path / "run")
        config = replace(config, sac=replace(config.sac, nan_policy="skip"))
        folder = train(config, make_world=partial(make_world, constant_reward=HUGE))
        said = capsys.readouterr().out
        assert "warning: non-finite losses" in said
        assert "critic loss of east" in said
        learner = load_checkpoint(folder, CPU)[1]["learner"]
        assert float(learner["updates"]) == 0
        assert all(torch.isfinite(value).all() for value in learner.values())


def test_a_vector_steps_arrays_reach_the_device_in_one_tensor_each_with_its_numbers(tmp_path):
    config = short_config(tmp_path / "run", envs=EnvsConfig(horizon=10, envs_per_task=2))
    with Run(config, make_world=make_world) as run:
        random = np.random.default_rng(1)
        wide, single, flags = random.standard_normal((8, 3)), random.standard_normal(8), random.random(8) < 0.5
        moved = run.on_device(wide, single, flags)
        for array, tensor in zip((wide, single, flags), moved, strict=True):
            assert tensor.dtype == torch.float32
            assert tensor.shape == (4, 2, *array.shape[1:])
            np.testing.assert_array_equal(tensor.numpy(), array.reshape(tensor.shape).astype(np.float32))


class TestPipeline:
    """`envs.pipeline`: each vector step runs while an update uses what was stored before it."""

    @staticmethod
    def config(run_dir: Path, **sections) -> Config:
        return short_config(run_dir, envs=EnvsConfig(horizon=10, pipeline=True), **sections)

    def test_an_update_comes_between_sending_actions_and_waiting_and_sees_one_step_less(self, tmp_path):
        events: list[str | tuple[str, int]] = []
        with Run(self.config(tmp_path / "run"), make_world=make_world) as run:
            envs, learner, replay = run.envs, run.learner, run.replay
            send, wait, update = envs.step_async, envs.step_wait, learner.update
            envs.step_async = lambda actions: (events.append("send"), send(actions))[1]
            envs.step_wait = lambda: (events.append("wait"), wait())[1]
            learner.update = lambda *batch: (events.append(("update", replay.written)), update(*batch))[1]
            run_training(run)
        assert events[: 40 * 2] == ["send", "wait"] * 40  # the warm-up
        for step in range(40, 120):
            assert events[80 + 3 * (step - 40) :][:3] == ["send", ("update", step), "wait"]

    def test_it_is_as_repeatable_as_without(self, tmp_path, read_progress):
        first, second = (train(self.config(tmp_path / name), make_world=make_world) for name in ("a", "b"))
        assert read_progress(first) == read_progress(second)
        without = train(short_config(tmp_path / "without"), make_world=make_world)
        assert read_progress(first)[-1]["train/q_mean"] != read_progress(without)[-1]["train/q_mean"]

    def test_it_resumes_exactly(self, tmp_path, read_progress):
        half, whole = (tiny_sac(steps=steps, warmup=40, batch_per_task=16) for steps in (80, 120))
        straight = train(self.config(tmp_path / "straight", sac=whole), make_world=make_world)
        train(self.config(tmp_path / "parts", sac=half), make_world=make_world)
        resumed = train(self.config(tmp_path / "parts", sac=whole), resume=tmp_path / "parts", make_world=make_world)
        assert read_progress(straight) == read_progress(resumed)

    def test_it_learns(self, tmp_path, read_csv):
        config = tiny_config(tmp_path / "run", aggregator=Mean(), envs=EnvsConfig(horizon=10, pipeline=True))
        assert final_success(read_csv, train(config, make_world=make_world)) >= 0.9
