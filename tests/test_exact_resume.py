"""A run that was stopped and resumed has the numbers of one that never was, to the last bit.

Every run here has 44 steps in episodes of 10, a checkpoint every 11, and a power cut at its 26th vector step: after
log rows and an evaluation that follow the checkpoint it goes on from, which is never where an episode begins.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import points
import pytest
import torch
from metaworld.policies import ENV_POLICY_MAP
from run_folders import differences
from tiny_world import PowerCutError, tiny_config, tiny_sac

from mtrl_imgrad import Config, train
from mtrl_imgrad.aggregators import AGGREGATORS, Aggregator, GradVac, MoCo
from mtrl_imgrad.checkpoint import Tensors, save_checkpoint
from mtrl_imgrad.config import (
    BenchmarkConfig,
    CheckpointConfig,
    EnvsConfig,
    EvalConfig,
    LogConfig,
    NetworkConfig,
    ReplayConfig,
)
from mtrl_imgrad.envs import MT50, MetaworldVectorEnv, make_goals
from mtrl_imgrad.kept_checkpoints import choose_checkpoint
from mtrl_imgrad.trainer import open_run
from mtrl_imgrad.world import metaworld

CUT = 26
STATE = "state.json"
EVALUATIONS = EvalConfig(every=12, goals_per_task=2, horizon=5)


def settings_of(rule: type[Aggregator]) -> Iterator[Aggregator]:
    """A rule with its defaults, and with each other choice and each whole number at 2, one field at a time."""
    yield rule()
    hints = get_type_hints(rule)
    for field in dataclasses.fields(rule):  # pyright: ignore[reportArgumentType]
        kind = hints[field.name]
        choices = get_args(kind) if get_origin(kind) is Literal else (2,) if kind is int else ()
        yield from (rule(**{field.name: choice}) for choice in choices if choice != field.default)


STATEFUL = [rule for cls in AGGREGATORS.values() for rule in settings_of(cls) if rule.initial_state((2,), 3)]
"""Every rule that remembers anything, in every choice in which it does."""


def short_config(run_dir: Path | str = "", **sections: Any) -> Config:
    defaults: dict[str, Any] = {
        "aggregator": GradVac(),
        "benchmark": BenchmarkConfig(tasks=("east", "west"), goals=4),
        "envs": envs(),
        "network": NetworkConfig(kind="multi_head", width=8, depth=2),
        "sac": sac(),
        "replay": ReplayConfig(capacity=1000),
        "eval": EVALUATIONS,
        "log": LogConfig(every=7, tensorboard=False),
        "checkpoint": CheckpointConfig(every=11),
    }
    return replace(tiny_config(run_dir), **(defaults | sections))


def envs(**fields: Any) -> EnvsConfig:
    return EnvsConfig(**({"horizon": 10, "workers": 0} | fields))


def sac(**fields: Any) -> Any:
    return tiny_sac(**({"steps": 44, "warmup": 12, "batch_per_task": 8} | fields))


def train_until(
    decisions: int, config: Config, resume: Path | None = None, make_world: Any = points.make_world
) -> Path:
    """Train until the power fails, in this many vector steps of this process."""
    opened, loop = open_run(config, resume, make_world)
    with pytest.raises(PowerCutError), opened as run:
        loop(mortal(run, decisions))
    return Path(config.run_dir)


def mortal(run: Any, decisions: int) -> Any:
    """The run, which is to die at this vector step from now."""
    step_async, left = run.envs.step_async, iter(range(decisions - 1))

    def step_or_die(actions: Any) -> None:
        if next(left, None) is None:
            raise PowerCutError
        step_async(actions)

    run.envs.step_async = step_or_die
    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Callable[[Config], Path]:
    """The run of a config that is left alone, in one process; runs are made once."""
    runs: dict[Config, Path] = {}

    def run(config: Config) -> Path:
        alone = replace(config, envs=replace(config.envs, workers=0))
        if alone not in runs:
            place = tmp_path_factory.mktemp("straight") / "run"
            runs[alone] = train(replace(alone, run_dir=str(place)), make_world=points.make_world)
        return runs[alone]

    return run


@pytest.fixture
def resumed(tmp_path) -> Callable[[Config], Path]:
    """A run of a config that was cut and went on."""

    def run(config: Config) -> Path:
        config = replace(config, run_dir=str(tmp_path / "run"))
        folder = train_until(CUT // config.vector_step, config)
        assert choose_checkpoint(folder).state()["envs"]["actions"], "inside of episodes"
        return train(config, resume=folder, make_world=points.make_world)

    return run


@pytest.mark.parametrize("rule", STATEFUL, ids=str)
def test_with_every_rule_that_has_state(straight, resumed, rule):
    config = short_config(aggregator=rule)
    assert differences(resumed(config), straight(config)) == set()


@pytest.mark.parametrize("pipeline", [False, True], ids=["in turn", "pipelined"])
@pytest.mark.parametrize("workers", [0, 2])
def test_with_and_without_workers_and_pipelining(straight, resumed, workers, pipeline):
    config = short_config(envs=envs(workers=workers, pipeline=pipeline))
    assert differences(resumed(config), straight(config)) == set()


SETTINGS: dict[str, dict[str, Any]] = {
    "three environments per task": {"envs": envs(envs_per_task=3)},
    "repeated actions": {"envs": envs(action_repeat=2)},
    "normalised rewards and observations": {
        "envs": envs(reward_normalization="ema"),
        "network": NetworkConfig(width=8, depth=2, observation_normalization=True),
    },
    "windows, two updates, one encoder, categorical critics": {
        "sac": sac(n_step=3, updates_per_step=2, max_grad_norm=1.0, shared_temperature=True, critic_loss="categorical"),
        "network": NetworkConfig(width=8, depth=2, share_encoder=True),
    },
    "rewards by their returns and correlated noise": {
        "sac": sac(return_scaling="rms", noise_correlation=0.7, random_start=5),
        "envs": envs(envs_per_task=2),
    },
    "a replay that is overwritten": {"replay": ReplayConfig(capacity=13)},
    "checkpoints that are kept": {"checkpoint": CheckpointConfig(every=11, keep_every=20)},
}


@pytest.mark.parametrize("sections", SETTINGS.values(), ids=SETTINGS)
def test_with_other_settings(straight, resumed, sections):
    config = short_config(**sections)
    assert differences(resumed(config), straight(config)) == set()


def test_skipping_what_is_not_finite_changes_no_number(straight, resumed):
    assert differences(resumed(short_config(sac=sac(nan_policy="skip"))), straight(short_config())) == set()


def test_from_the_checkpoint_before_the_newest(tmp_path, straight):
    config = short_config(tmp_path / "run")
    folder = train_until(CUT, config)
    shutil.rmtree(folder / "checkpoints" / "0000000022")
    assert choose_checkpoint(folder).step == 11
    train(config, resume=folder, make_world=points.make_world)
    assert differences(folder, straight(short_config())) == set()


def test_resumed_twice(tmp_path, straight):
    config = short_config(tmp_path / "run")
    folder = train_until(CUT, config)
    train_until(15, config, resume=folder)
    assert choose_checkpoint(folder).step == 33
    train(config, resume=folder, make_world=points.make_world)
    assert differences(folder, straight(short_config())) == set()


def test_a_longer_budget_goes_on_inside_of_the_episode_as_if_it_had_been_given_at_once(tmp_path, straight):
    half = short_config(tmp_path / "run", sac=sac(steps=22), eval=replace(EVALUATIONS, final=False))
    folder = train(half, make_world=points.make_world)
    train(short_config(folder), resume=folder, make_world=points.make_world)
    # Where a run ends there is a log row, whether one is due or not.
    assert differences(folder, straight(short_config())) == {"progress.csv"}


def test_compiled(straight, resumed, capsys):
    config = short_config(compile=True)
    assert differences(resumed(config), straight(config)) == set()
    assert capsys.readouterr().out.count("compiled in") == 3


def test_on_metaworld_with_workers_and_pipelining(tmp_path):
    config = short_config(
        aggregator=MoCo(),
        benchmark=BenchmarkConfig(tasks=("reach-v3", "push-v3"), goals=3),
        envs=envs(workers=2, pipeline=True, self_check="off"),
    )
    whole, parts = (replace(config, run_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole)
    train_until(CUT, parts, make_world=metaworld)
    train(parts, resume=tmp_path / "parts")
    assert differences(tmp_path / "parts", tmp_path / "whole") == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Constant")  # of the experts, about their own gains
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "as Meta-World steps"])
def test_every_task_of_metaworld_goes_on_where_an_expert_was(fast):
    """In the third episode of each task, in simulators that have another past."""
    horizon, random = 120, np.random.default_rng(0)
    goals = make_goals(MT50, goal_seed=7)
    common: Any = {"horizon": horizon, "workers": 0, "fast": fast, "self_check": False}
    straight, resumed = (MetaworldVectorEnv(MT50, goals, seed=seed, **common) for seed in (1, 2))
    experts = [ENV_POLICY_MAP[task]() for task in MT50]

    def actions(observations: np.ndarray) -> np.ndarray:
        own = [expert.get_action(row.astype(float)) for expert, row in zip(experts, observations, strict=True)]
        return (np.stack(own) + random.normal(0, 0.1, (50, 4))).astype(np.float32)

    won = np.zeros(50, bool)
    there, elsewhere = straight.reset()[0], resumed.reset()[0]
    for step in range(2 * horizon + 70):
        there, *_, infos = straight.step(actions(there))
        won |= infos["success"]
        if step < 30:
            elsewhere = resumed.step(actions(elsewhere))[0]
    state = json.loads(json.dumps(straight.state_dict()))
    assert resumed.load_state_dict(state)[0].tobytes() == there.tobytes()
    for _ in range(horizon):
        taken = actions(there)
        (there, *others, infos), (observations, *found, own_infos) = straight.step(taken), resumed.step(taken)
        pairs = zip((there, *others, *infos.values()), (observations, *found, *own_infos.values()), strict=True)
        assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in pairs)
    assert won.sum() >= 45, "the experts met what there is to meet"
    for envs_of_all in (straight, resumed):
        envs_of_all.close()


# ---------------------------------------------------------------------------------------------------------------------
# These tests would see it if a part of a checkpoint were lost: each part has consequences when it is another
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    """A run that was cut."""
    return train_until(CUT, replace(watchful(), run_dir=str(tmp_path_factory.mktemp("cut") / "run")))


def watchful() -> Config:
    """A config under which everything that a checkpoint holds has a use."""
    network = NetworkConfig(kind="multi_head", width=8, depth=2, observation_normalization=True)
    tasks = BenchmarkConfig(tasks=("east", "north", "west"), goals=4)
    envs_that_normalize = envs(reward_normalization="ema")
    tracked = sac(n_step=3, return_scaling="rms", noise_correlation=0.5, random_start=5)
    return short_config(benchmark=tasks, envs=envs_that_normalize, network=network, sac=tracked)


def resume_altered(cut: Path, place: Path, alter: Callable[[dict[str, Any], dict[str, Tensors]], None]) -> Path:
    """Resume a copy of a run whose newest checkpoint was altered, with a manifest that knows nothing of it."""
    shutil.copytree(cut, place)
    checkpoint = choose_checkpoint(place)
    groups = {Path(file).stem: checkpoint.part(Path(file).stem, "cpu") for file in checkpoint.files if file != STATE}
    state = checkpoint.state()
    alter(state, groups)
    parts: list[dict[str, Callable[[], Tensors]]] = [{}, {}]
    for name, tensors in groups.items():
        parts[name.startswith("replay-")][name] = partial(dict, tensors)
    save_checkpoint(place, checkpoint.place.name, checkpoint.step, state, *parts)
    return train(replace(watchful(), run_dir=str(place)), resume=place, make_world=points.make_world)


def test_a_checkpoint_that_is_written_again_unaltered_gives_the_same(tmp_path, straight, cut):
    folder = resume_altered(cut, tmp_path / "run", lambda state, groups: None)
    assert differences(folder, straight(watchful())) == set()


TENSORS = {
    "learner": "critic critic/m critic/v critic/rule/target_cosines target_critic actor actor/m actor/v "
    "actor/rule/target_cosines log_alpha log_alpha/m log_alpha/v statistics updates non_finite noise returns "
    "return_size return_steps random_left",
    "generators": "replay policy aggregation",
    "rewards": "mean variance",
    "episodes": "ended",
    "cosines": "count gradients/actor/cosine gradients/critic/cosine",
    "averages": "count train/q_mean",
    "replay": "observations other_next_observations actions rewards terminated ended repeated",
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in TENSORS for name in TENSORS[group].split()])
def test_one_number_of_a_tensor_has_consequences(tmp_path, straight, cut, group, name):
    def alter(state: dict[str, Any], groups: dict[str, Tensors]) -> None:
        (stored,) = (tensors for file, tensors in groups.items() if file.partition("-")[0] == group)
        numbers = stored[name].view(-1)
        if group == "generators":  # of one number of a stream, what is left of the run need not depend
            stored[name] = torch.Generator().manual_seed(0).get_state()
        elif numbers.dtype == torch.bool:  # nor of one flag
            stored[name] = ~stored[name]
        else:
            numbers[min(1, len(numbers) - 1)] += 1

    found = differences(resume_altered(cut, tmp_path / "run", alter), straight(watchful()))
    assert {other for other in found - {f"{group}/{name}"} if not other.startswith("checkpoints/")}


def test_every_tensor_of_a_checkpoint_is_altered_by_the_test_above(cut):
    checkpoint = choose_checkpoint(cut)
    groups = {Path(file).stem: checkpoint.part(Path(file).stem, "cpu") for file in checkpoint.files if file != STATE}
    held = {group.partition("-")[0]: set(tensors) for group, tensors in groups.items()}
    altered = {group: set(names.split()) for group, names in TENSORS.items()}
    assert altered.pop("averages") < held.pop("averages"), "one mean stands for all"
    assert held.pop("replay") - altered.pop("replay") == {"start", "other"}, "they tell the shapes"
    assert held == altered


def first_goal(state: dict[str, Any]) -> None:
    state["envs"]["start"]["goal"][0] ^= 1


def goal_stream(state: dict[str, Any]) -> None:
    state["envs"]["start"]["schedule"]["generators"][0]["state"]["state"] += 1


def last_action(state: dict[str, Any]) -> None:
    state["envs"]["actions"][-1] = "0000803f" + state["envs"]["actions"][-1][8:]  # 1.0


def a_restart(state: dict[str, Any]) -> None:
    state["envs"]["restarts"] = [[len(state["envs"]["actions"]) - 1, [0]]]


@pytest.mark.parametrize("alter", [first_goal, last_action, a_restart], ids=lambda alter: alter.__name__)
def test_one_number_of_the_running_episodes_is_seen(tmp_path, cut, alter):
    """Its episode ends elsewhere, and where it was is in the replay."""
    with pytest.raises(ValueError, match=r"its episode of east is not the one that the environment goes on with"):
        resume_altered(cut, tmp_path / "run", lambda state, groups: alter(state))


def test_one_number_of_the_goal_stream_has_consequences(tmp_path, straight, cut):
    folder = resume_altered(cut, tmp_path / "run", lambda state, groups: goal_stream(state))
    assert {"replay/observations", "learner/critic", "progress.csv"} <= differences(folder, straight(watchful()))
