"""stable-baselines3's SAC as a baseline: its own numbers, our counting, evaluation, run folder and resume."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_checkpoint
from run_folders import differences
from stable_baselines3 import SAC
from stable_baselines3.common.policies import BasePolicy
from tiny_world import PowerCutError, TinyVectorEnv, dying_world, make_world, tiny_config, tiny_sac

import mtrl_imgrad
from mtrl_imgrad import Config, train
from mtrl_imgrad.baselines.global_streams import GlobalStreams
from mtrl_imgrad.baselines.sb3_model import LOSSES
from mtrl_imgrad.baselines.sb3_run import Sb3Run, model_seeds
from mtrl_imgrad.baselines.sb3_training import chunk_ends, run_sb3_training
from mtrl_imgrad.config import BenchmarkConfig, CheckpointConfig, EnvsConfig, EvalConfig, LogConfig, Sb3Config
from mtrl_imgrad.envs.sb3 import MtVecEnv
from mtrl_imgrad.run import STREAMS
from mtrl_imgrad.run_description import read_config

CPU = torch.device("cpu")
TASKS = ("east", "north", "west", "south")
ALGORITHMS = ("sb3-sac", "sb3-sac-blind", "sb3-sac-single")
LEARNING = Sb3Config(
    learning_rate=2e-3,
    batch_size=64,
    gamma=0.9,
    tau=0.02,
    ent_coef="auto_0.05",
    target_entropy="-2",
    net_arch=(64, 64),
    buffer_size=10_000,
)
"""Settings under which SAC learns the tiny world in 500 updates."""


def short_config(run_dir: Path | str, algorithm: Any, **sections: Any) -> Config:
    """A short run with updates, evaluations and several log rows."""
    defaults: dict[str, Any] = {
        "algorithm": algorithm,
        "sac": tiny_sac(steps=120, warmup=40),
        "sb3": Sb3Config(batch_size=16, net_arch=(16, 16), buffer_size=1000),
        "eval": EvalConfig(every=40, goals_per_task=3, horizon=10),
        "log": LogConfig(every=20, tensorboard=False),
    }
    return tiny_config(run_dir, **(defaults | sections))


def stream(config: Config, name: str) -> np.random.SeedSequence:
    return np.random.SeedSequence(config.seed).spawn(len(STREAMS))[STREAMS.index(name)]


def sb3s_own(config: Config, envs: Any, seed: int, one_hot: bool) -> SAC:
    """What a user of stable-baselines3 would write: one SAC, one `learn`."""
    adapter = MtVecEnv(envs, task_one_hot=one_hot)
    adapter.action_space.seed(seed)
    with GlobalStreams(seed, CPU).lent():
        model = SAC(
            "MlpPolicy",
            adapter,
            batch_size=16,
            buffer_size=1000,
            learning_starts=40 * envs.num_tasks,
            policy_kwargs={"net_arch": [16, 16]},
            device="cpu",
        )
        return model.learn(120 * envs.num_tasks)


def assert_same_model(found: SAC, expected: SAC) -> None:
    assert found.num_timesteps == expected.num_timesteps
    assert found._n_updates == expected._n_updates > 0
    for name, value in expected.policy.state_dict().items():
        assert torch.equal(found.policy.state_dict()[name], value), name
    assert found.log_ent_coef is not None
    assert torch.equal(found.log_ent_coef, expected.log_ent_coef)
    ours, theirs = found.replay_buffer, expected.replay_buffer
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


class TestAgainstStableBaselines3:
    """Our loop in chunks, with evaluations and checkpoints between, gives the numbers of SB3's own single `learn`."""

    @pytest.mark.parametrize("algorithm", ["sb3-sac", "sb3-sac-blind"])
    def test_one_model_for_all_tasks(self, tmp_path, algorithm):
        config = short_config(tmp_path / "run", algorithm, checkpoint=CheckpointConfig(every=30))
        with Sb3Run(config, make_world=make_world) as run:
            run_sb3_training(run)
        envs = make_world(config, None).training(stream(config, "envs"), TASKS)
        expected = sb3s_own(config, envs, model_seeds(config, 1)[0], one_hot=algorithm == "sb3-sac")
        assert_same_model(run.models[0].sac, expected)

    def test_one_model_per_task(self, tmp_path):
        config = short_config(tmp_path / "run", "sb3-sac-single", checkpoint=CheckpointConfig(every=30))
        with Sb3Run(config, make_world=make_world) as run:
            run_sb3_training(run)
        seeds, streams = model_seeds(config, 4), stream(config, "envs").spawn(4)
        for model, task, seed, of_env in zip(run.models, TASKS, seeds, streams, strict=True):
            envs = make_world(config, None).training(of_env, (task,))
            assert_same_model(model.sac, sb3s_own(config, envs, seed, one_hot=False))

    def test_defaults_are_those_of_sb3(self):
        theirs = inspect.signature(SAC).parameters
        own = {field.name: field.default for field in fields(Sb3Config) if field.name != "net_arch"}
        assert own == {name: theirs[name].default for name in own}
        layers = SAC("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=1).policy.net_arch
        assert list(Sb3Config().net_arch) == layers

    def test_the_networks_start_as_sb3s_seeding_makes_them(self, tmp_path):
        config = short_config(tmp_path / "run", "sb3-sac")
        envs = make_world(config, None).training(stream(config, "envs"), TASKS)
        (seed,) = model_seeds(config, 1)
        arguments: dict[str, Any] = {"policy_kwargs": {"net_arch": [16, 16]}, "buffer_size": 10, "device": "cpu"}
        with GlobalStreams(0, CPU).lent():
            theirs = SAC("MlpPolicy", MtVecEnv(envs, task_one_hot=True), seed=seed, **arguments)
        with Sb3Run(config, make_world=make_world) as run:
            for name, value in theirs.policy.state_dict().items():
                assert torch.equal(run.models[0].sac.policy.state_dict()[name], value), name
            assert np.array_equal(theirs.action_space.sample(), run.models[0].sac.action_space.sample())


class TestLearning:
    @pytest.fixture(scope="class")
    @classmethod
    def success(cls, tmp_path_factory, read_csv) -> dict[str, float]:
        """Final success of each algorithm."""
        place, rates = tmp_path_factory.mktemp("learning"), {}
        for algorithm in ALGORITHMS:
            rows = read_csv(train(learned(place / algorithm, algorithm), make_world=make_world) / "eval.csv")
            assert len(rows) == 2 * 10
            rates[algorithm] = float(np.mean([float(row["success"]) for row in rows]))
        return rates

    @pytest.mark.parametrize("algorithm", ["sb3-sac", "sb3-sac-single"])
    def test_the_tiny_world_is_learned(self, success, algorithm):
        assert success[algorithm] >= 0.9

    def test_a_task_blind_network_cannot_learn_opposite_tasks(self, success):
        assert success["sb3-sac-blind"] <= 0.3

    @pytest.mark.parametrize(("terminates", "value"), [(False, 2.0), (True, 1.0)], ids=["truncation", "termination"])
    def test_a_truncation_bootstraps_and_a_termination_does_not(self, tmp_path, terminates, value):
        """Reward 1 in episodes of one step, gamma 1/2: 1 / (1 - gamma), or 1 where the world ends."""
        settings = replace(LEARNING, gamma=0.5, tau=0.1, ent_coef="1e-6")
        config = replace(
            learned(tmp_path / "run", "sb3-sac"),
            envs=EnvsConfig(horizon=1),
            sb3=settings,
            sac=tiny_sac(steps=350, warmup=50),
            eval=EvalConfig(every=0, final=False),
        )
        world = partial(make_world, constant_reward=1.0, terminates=terminates)
        with Sb3Run(config, make_world=world) as run:
            run_sb3_training(run)
            sac = run.models[0].sac
            batch = sac.replay_buffer.sample(64)
            with torch.no_grad():
                values = torch.cat(sac.critic(batch.observations, batch.actions))
        assert float(values.mean()) == pytest.approx(value, abs=0.05)


def learned(run_dir: Path, algorithm: Any) -> Config:
    """Two tasks, whose goals lie in opposite directions."""
    tasks = BenchmarkConfig(tasks=("east", "west"), goals=10)
    return tiny_config(run_dir, algorithm=algorithm, benchmark=tasks, sb3=LEARNING, sac=tiny_sac(steps=700, warmup=200))


class TestRepeatability:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_the_same_seed_gives_the_same_numbers_whatever_the_global_generators(
        self, tmp_path, read_progress, algorithm
    ):
        folders = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            config = short_config(tmp_path / str(seed), algorithm, sac=tiny_sac(steps=60, warmup=30))
            folders.append(train(config, make_world=make_world))
        assert len(read_progress(folders[0])) == 3
        assert read_progress(folders[0]) == read_progress(folders[1])
        assert (folders[0] / "eval.csv").read_bytes() == (folders[1] / "eval.csv").read_bytes()

    def test_the_programs_global_generators_are_left_alone(self, tmp_path):
        def draws() -> tuple[float, float]:
            return float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

        results = []
        for training in (False, True):
            torch.manual_seed(5)
            np.random.seed(5)  # noqa: NPY002
            if training:
                config = short_config(tmp_path / "run", "sb3-sac-single", sac=tiny_sac(steps=30, warmup=20))
                train(config, make_world=make_world)
            results.append(draws())
        assert results[0] == results[1]

    def test_single_task_models_do_not_depend_on_how_often_training_is_reported(self, tmp_path):
        parts = []
        for every in (4, 60):
            log, sac = LogConfig(every=every, tensorboard=False), tiny_sac(steps=60, warmup=30)
            config = short_config(tmp_path / str(every), "sb3-sac-single", log=log, sac=sac)
            folder = train(config, make_world=make_world)
            parts.append(load_checkpoint(folder, CPU)[1]["learner"])
        assert all(torch.equal(value, parts[1][name]) for name, value in parts[0].items())

    def test_models_of_different_tasks_have_different_random_numbers(self, tmp_path):
        folder = train(short_config(tmp_path / "run", "sb3-sac-single"), make_world=make_world)
        replay = load_checkpoint(folder, CPU)[1]["replay"]
        actions = [replay[f"{number}.actions"][:40] for number in range(4)]
        goals = [replay[f"{number}.observations"][::10, 0, 2] for number in range(4)]
        for other in range(1, 4):
            assert not torch.equal(actions[0], actions[other])
            assert not torch.equal(goals[0], goals[other])


@pytest.fixture(scope="module", params=ALGORITHMS)
def straight_and_resumed(request, tmp_path_factory) -> tuple[Path, Path]:
    """A run of 240 steps, and one of 120 that was resumed to 240; the checkpoint lies between two log rows."""
    place = tmp_path_factory.mktemp("resume")
    common: dict[str, Any] = {
        "envs": EnvsConfig(horizon=10, envs_per_task=2, reward_normalization="ema"),
        "log": LogConfig(every=50, tensorboard=False),
        "sac": tiny_sac(steps=240, warmup=40),
        "checkpoint": CheckpointConfig(every=115),
    }
    straight = train(short_config(place / "straight", request.param, **common), make_world=make_world)
    cut = short_config(place / "parts", request.param, **common)
    with pytest.raises(PowerCutError):
        train(cut, make_world=dying_world(76))
    assert load_checkpoint(place / "parts", CPU)[0]["step"] == 116, "inside of an episode"
    return straight, train(cut, resume=place / "parts", make_world=make_world)


class TestResume:
    def test_every_number_is_the_same(self, straight_and_resumed):
        straight, resumed = straight_and_resumed
        state, parts = load_checkpoint(straight, CPU)
        assert state["step"] == 240
        assert set(parts) == {"learner", "replay", "generators", "rewards", "episodes"}
        assert differences(resumed, straight) == set()

    def test_nothing_in_the_folder_is_a_pickle(self, straight_and_resumed):
        for path in straight_and_resumed[1].rglob("*"):
            if path.is_file() and path.name != "lock":
                assert path.suffix in {".txt", ".yaml", ".csv", ".json", ".safetensors"}
                pickles = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK")
                assert not path.read_bytes().startswith(pickles), f"{path} looks like a pickle or a torch archive"

    def test_a_run_without_a_checkpoint_starts_again_with_the_same_numbers(
        self, straight_and_resumed, tmp_path, read_progress
    ):
        straight, _ = straight_and_resumed
        shutil.copytree(straight, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        config = read_config(straight)
        train(config, resume=tmp_path / "run", make_world=make_world)
        assert read_progress(tmp_path / "run") == read_progress(straight)

    def test_a_longer_budget_goes_on_inside_the_episode_as_if_it_had_been_given_at_once(self, tmp_path):
        short, long = (tiny_sac(steps=steps, warmup=40) for steps in (55, 75))
        train(short_config(tmp_path / "parts", "sb3-sac", sac=short), make_world=make_world)
        train(short_config(tmp_path / "parts", "sb3-sac", sac=long), resume=tmp_path / "parts", make_world=make_world)
        train(short_config(tmp_path / "straight", "sb3-sac", sac=long), make_world=make_world)
        straight, parts = (load_checkpoint(tmp_path / name, CPU)[1] for name in ("straight", "parts"))
        for part in ("learner", "replay", "generators"):
            for name, value in straight[part].items():
                assert torch.equal(value, parts[part][name]), f"{part}/{name}"

    def test_only_the_filled_part_of_the_replay_is_saved_and_a_full_one_goes_on(self, tmp_path):
        """A buffer of 30 transitions per environment wraps; a resumed run overwrites the same ones."""
        small = Sb3Config(batch_size=16, net_arch=(16, 16), buffer_size=30 * 4)
        straight = train(short_config(tmp_path / "a", "sb3-sac", sb3=small), make_world=make_world)
        part = short_config(tmp_path / "b", "sb3-sac", sb3=small, sac=tiny_sac(steps=70, warmup=40))
        train(part, make_world=make_world)
        state, tensors = load_checkpoint(tmp_path / "b", CPU)
        assert (state["models"][0]["full"], state["models"][0]["position"]) == (True, 10)
        assert tensors["replay"]["0.rewards"].shape == (30, 4)
        whole = replace(part, sac=tiny_sac(steps=120, warmup=40))
        resumed = train(whole, resume=tmp_path / "b", make_world=make_world)
        for name, value in load_checkpoint(straight, CPU)[1]["replay"].items():
            assert torch.equal(value, load_checkpoint(resumed, CPU)[1]["replay"][name]), name

    def test_without_the_replay_it_is_refused(self, tmp_path):
        config = short_config(tmp_path / "run", "sb3-sac", checkpoint=CheckpointConfig(replay=False))
        train(config, make_world=make_world)
        assert mtrl_imgrad.load(tmp_path / "run").step == 120
        with pytest.raises(ValueError, match=r"checkpoint\.replay"):
            train(config, resume=tmp_path / "run", make_world=make_world)


class TestFailures:
    def test_a_replay_that_does_not_fit_is_refused_before_anything_is_written(self, tmp_path):
        config = short_config(tmp_path / "run", "sb3-sac", sb3=Sb3Config(buffer_size=10**14))
        with pytest.raises(MemoryError, match=r"^sb3\.buffer_size: 100,000,000,000,000 transitions do not fit"):
            train(config, make_world=make_world)
        assert not (tmp_path / "run").exists()

    def test_a_run_shorter_than_one_vector_step_is_saved_and_evaluated(self, tmp_path, read_csv):
        config = short_config(
            tmp_path / "run", "sb3-sac", envs=EnvsConfig(horizon=10, envs_per_task=2), sac=tiny_sac(steps=1)
        )
        assert len(read_csv(train(config, make_world=make_world) / "eval.csv")) == 4 * 10
        assert mtrl_imgrad.load(tmp_path / "run").step == 0


class TestCounting:
    """Every interval is in simulator steps per task, as in our runs."""

    @pytest.mark.parametrize("algorithm", ["sb3-sac", "sb3-sac-single"])
    @pytest.mark.parametrize(("envs_per_task", "action_repeat"), [(1, 1), (2, 1), (1, 2), (2, 2)])
    def test_a_vector_step_counts_environments_and_repeated_actions(
        self, tmp_path, read_csv, algorithm, envs_per_task, action_repeat
    ):
        envs = EnvsConfig(horizon=10, envs_per_task=envs_per_task, action_repeat=action_repeat)
        folder = train(short_config(tmp_path / "run", algorithm, envs=envs), make_world=make_world)
        rows = read_csv(folder / "progress.csv")
        assert [int(row["step"]) for row in rows] == [20, 40, 60, 80, 100, 120]
        assert [float(row["rollout/transitions"]) for row in rows] == [int(row["step"]) * 4 for row in rows]
        decisions, warmup = (steps // (envs_per_task * action_repeat) for steps in (120, 40))
        assert float(rows[-1]["train/updates"]) == decisions - warmup
        assert {float(row["rollout/ep_len_mean"]) for row in rows if row["rollout/ep_len_mean"]} == {10.0}

    def test_as_many_updates_as_transitions(self, tmp_path, read_csv):
        settings = Sb3Config(batch_size=16, net_arch=(16, 16), buffer_size=1000, gradient_steps=-1)
        config = short_config(tmp_path / "run", "sb3-sac", sb3=settings, sac=tiny_sac(steps=60, warmup=40))
        assert float(read_csv(train(config, make_world=make_world) / "progress.csv")[-1]["train/updates"]) == 20 * 4

    def test_the_warm_up_is_uniformly_random(self, tmp_path):
        config = short_config(tmp_path / "run", "sb3-sac", sac=tiny_sac(steps=250, warmup=250))
        folder = train(config, make_world=make_world)
        actions = load_checkpoint(folder, CPU)[1]["replay"]["0.actions"].flatten()
        assert len(actions) == 250 * 4 * 2
        histogram = torch.histc(actions, 10, -1, 1) / len(actions)
        # 2000 draws: the standard deviation of a bin's share is 0.007.
        assert histogram.tolist() == pytest.approx([0.1] * 10, abs=0.035)

    def test_the_loop_stops_where_something_is_due(self):
        saving = CheckpointConfig(every=40)
        config = short_config("", "sb3-sac", log=LogConfig(every=25), eval=EvalConfig(every=0), checkpoint=saving)
        assert chunk_ends(config, 0) == [25, 40, 50, 75, 80, 100, 120]
        assert chunk_ends(config, 35) == [40, 50, 75, 80, 100, 120]
        assert chunk_ends(config, 120) == []


class TestRewards:
    def test_normalised_rewards_are_stored_as_ours_are_and_returns_stay(self, tmp_path, read_csv):
        """Rewards of 1 throughout the warm-up: the variance, and so the stored reward, follow mtrl's recursion."""
        envs = EnvsConfig(horizon=10, reward_normalization="ema")
        config = short_config(tmp_path / "run", "sb3-sac", envs=envs)
        folder = train(config, make_world=partial(make_world, constant_reward=1.0))
        rewards = load_checkpoint(folder, CPU)[1]["replay"]["0.rewards"]
        mean, variance, expected = 0.0, 1.0, []
        for _ in range(120):
            mean += 0.001 * (1 - mean)
            variance += 0.001 * ((1 - mean) ** 2 - variance)
            expected.append(variance**-0.5)
        assert rewards[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
        assert {float(row["rollout/ep_rew_mean"]) for row in read_csv(folder / "progress.csv")} == {10.0}


class TestRunFolder:
    @pytest.fixture(scope="class", params=ALGORITHMS)
    @classmethod
    def run(cls, request, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("folder") / "run"
        return train(short_config(folder, request.param, log=LogConfig(every=20)), make_world=make_world)

    def test_it_has_the_files_of_every_run(self, run):
        names = {path.name for path in run.iterdir()}
        assert names >= {"config.yaml", "command.txt", "versions.json", "goals.json", "progress.csv"}
        assert names >= {"eval_training.csv", "eval.csv", "tensorboard", "checkpoints"}
        assert "stable_baselines3" in json.loads((run / "versions.json").read_text())[0]

    def test_tags_are_a_part_of_those_of_our_own_runs(self, run, tmp_path, read_csv):
        ours = train(tiny_config(tmp_path / "ours", sac=tiny_sac(steps=120, warmup=40)), make_world=make_world)
        known = set(read_csv(ours / "progress.csv")[0]) | {"time/evaluation_ms", "eval/success_rate"}
        known |= {f"eval/success_rate/{task}" for task in TASKS}
        found = set(read_csv(run / "progress.csv")[0])
        assert found <= known
        assert found >= {*LOSSES, "train/updates", "rollout/success_rate/east", "time/elapsed", "time/update_ms"}

    def test_losses_of_single_tasks_are_there_where_a_network_has_one_task(self, run, read_csv):
        row = read_csv(run / "progress.csv")[-1]
        per_task = [f"train/critic_loss/{task}" for task in TASKS]
        if mtrl_imgrad.load(run).config.algorithm == "sb3-sac-single":
            assert float(row["train/critic_loss"]) == pytest.approx(np.mean([float(row[tag]) for tag in per_task]))
        else:
            assert not set(per_task) & set(row)

    def test_its_name_is_that_of_the_algorithm(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = short_config("", "sb3-sac", sac=tiny_sac(steps=20, warmup=20), eval=EvalConfig(final=False))
        assert str(train(config, make_world=make_world)) == "runs/4tasks-sb3-sac-s1"

    def test_the_loaded_agent_repeats_the_evaluation(self, run, read_csv):
        """Each task's own policy, through predict, gives the returns that the training process wrote."""
        agent = mtrl_imgrad.load(run)
        assert (agent.tasks, agent.step) == (TASKS, 120)
        policies = [agent.policy(task) for task in TASKS]
        assert {policy.action_repeat for policy in policies} == {1}
        rows = {(row["task"], int(row["goal"])): row for row in read_csv(run / "eval.csv")}
        assert len(rows) == 40
        envs = TinyVectorEnv(TASKS, 10, 0, horizon=10)
        observations, _ = envs.reset(options={"goals": np.tile(np.arange(10), (4, 1))})
        for goal in range(10):
            infos: dict[str, Any] = {}
            for _ in range(10):
                pairs = zip(policies, observations, strict=True)
                actions = [policy.predict(x, deterministic=True)[0] for policy, x in pairs]
                observations, _, _, _, infos = envs.step(np.stack(actions))
            for k, task in enumerate(TASKS):
                assert infos["episode_return"][k] == pytest.approx(float(rows[task, goal]["return"]), abs=1e-4)

    def test_predict_is_stable_baselines3s(self, run):
        policy = mtrl_imgrad.load(run).policy("north")
        assert (
            list(inspect.signature(policy.predict).parameters)
            == list(inspect.signature(BasePolicy.predict).parameters)[1:]
        )
        observations = np.random.default_rng(0).uniform(-1, 1, (5, 3))
        batch, state = policy.predict(observations, deterministic=True)
        assert (batch.shape, batch.dtype, state) == ((5, 2), np.float32, None)
        single, _ = policy.predict(observations[2], deterministic=True)
        np.testing.assert_allclose(single, batch[2], rtol=0, atol=1e-6)

    def test_sampling_repeats_itself_and_leaves_the_global_generators_alone(self, run):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        observations = np.zeros((5, 3))
        first, second = (mtrl_imgrad.load(run).policy("north").predict(observations)[0] for _ in range(2))
        assert np.array_equal(first, second)
        assert len(np.unique(first[:, 0])) == 5
        assert torch.equal(before, torch.get_rng_state())

    def test_the_start_says_what_is_used_and_what_is_not(self, tmp_path, capsys):
        train(short_config(tmp_path / "run", "sb3-sac-single"), make_world=make_world)
        said = capsys.readouterr().out
        assert "SAC of stable-baselines3" in said
        assert "not used: aggregator, network, replay" in said
        assert "one for each of 4 tasks" in said
