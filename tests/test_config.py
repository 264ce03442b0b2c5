"""Every field refuses what it cannot mean, naming itself, and a configuration survives its way through YAML."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregator, CAGrad
from mtrl_imgrad.config import (
    BenchmarkConfig,
    CheckpointConfig,
    Config,
    EnvsConfig,
    EvalConfig,
    LogConfig,
    NetworkConfig,
    ReplayConfig,
    SacConfig,
    Sb3Config,
    aggregator_name,
    from_dict,
    to_dict,
)
from mtrl_imgrad.overlays import parse_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SECTIONS = {
    "benchmark": BenchmarkConfig,
    "envs": EnvsConfig,
    "network": NetworkConfig,
    "sac": SacConfig,
    "replay": ReplayConfig,
    "sb3": Sb3Config,
    "eval": EvalConfig,
    "log": LogConfig,
    "checkpoint": CheckpointConfig,
}

OUT_OF_RANGE = [
    ("benchmark", "tasks", ()),
    ("benchmark", "goals", 0),
    ("benchmark", "goals", 51),
    ("envs", "envs_per_task", 0),
    ("envs", "horizon", 0),
    ("envs", "horizon", 501),
    ("envs", "action_repeat", 0),
    ("envs", "action_repeat", 501),
    ("envs", "goal_seed", -1),
    ("network", "width", 0),
    ("network", "depth", 0),
    ("network", "log_std_min", 3.0),
    ("sac", "steps", 0),
    ("sac", "warmup", -1),
    ("sac", "batch_per_task", 0),
    ("sac", "updates_per_step", 0),
    ("sac", "n_step", 0),
    ("sac", "gamma", 1.01),
    ("sac", "gamma", -0.01),
    ("sac", "gamma", math.nan),
    ("sac", "noise_correlation", 1.0),
    ("sac", "noise_correlation", -0.1),
    ("sac", "noise_correlation", math.nan),
    ("sac", "random_start", -1),
    ("sac", "min_temperature", -0.1),
    ("sac", "min_temperature", 1.1),
    ("sac", "min_temperature", math.nan),
    ("sac", "tau", 0.0),
    ("sac", "tau", 1.5),
    ("sac", "actor_lr", 0.0),
    ("sac", "critic_lr", -1e-3),
    ("sac", "temperature_lr", math.inf),
    ("sac", "adam_eps", 0.0),
    ("sac", "weight_decay", -0.1),
    ("sac", "max_grad_norm", -1.0),
    ("sac", "initial_temperature", 0.0),
    ("sac", "target_entropy", math.nan),
    ("sac", "reward_scale", 0.0),
    ("sac", "critic_bins", 2),
    ("sac", "critic_min", 200.0),
    ("replay", "capacity", 0),
    ("sb3", "learning_rate", 0.0),
    ("sb3", "buffer_size", 0),
    ("sb3", "batch_size", 0),
    ("sb3", "tau", 0.0),
    ("sb3", "gamma", 1.01),
    ("sb3", "gradient_steps", 0),
    ("sb3", "gradient_steps", -2),
    ("sb3", "target_update_interval", 0),
    ("sb3", "ent_coef", "automatic"),
    ("sb3", "ent_coef", "auto_0"),
    ("sb3", "ent_coef", "auto_1_0"),
    ("sb3", "ent_coef", "-1"),
    ("sb3", "target_entropy", "nan"),
    ("sb3", "net_arch", ()),
    ("sb3", "net_arch", (256, 0)),
    ("eval", "every", -1),
    ("eval", "goals_per_task", 0),
    ("eval", "horizon", 501),
    ("log", "every", 0),
    ("checkpoint", "every", -1),
    ("checkpoint", "keep_every", -1),
]


@dataclass(frozen=True)
class Half(Aggregator):
    """A rule of a user's, outside of the package."""

    factor: float = 0.5

    def solve(self, given):
        raise NotImplementedError


class TestRanges:
    @pytest.mark.parametrize(
        ("section", "field", "value"), OUT_OF_RANGE, ids=[f"{s}.{f}={v}" for s, f, v in OUT_OF_RANGE]
    )
    def test_a_value_out_of_range_is_refused_by_its_name(self, section, field, value):
        with pytest.raises(ValueError, match=rf"^{section}\.{field}[:,] .*must be") as caught:
            SECTIONS[section](**{field: value})
        assert "\n" not in str(caught.value)
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize("field", ["seed", "threads"])
    def test_plain_fields_are_refused_by_their_name(self, field):
        with pytest.raises(ValueError, match=rf"^{field}: -1 is not allowed; it must be "):
            Config(**{field: -1})

    def test_every_number_is_covered_by_a_case(self):
        """A new field needs a range and a case above, or an entry here that says why any number will do."""
        any_number = {("sac", "critic_max"), ("network", "log_std_max")}  # checked with their lower partners
        numbers = {
            (section, field.name)
            for section, kind in SECTIONS.items()
            for field in dataclasses.fields(kind)
            if type(getattr(kind(), field.name)) in (int, float)
        }
        assert numbers - any_number <= {(section, field) for section, field, _ in OUT_OF_RANGE}

    def test_a_shared_encoder_needs_two_layers(self):
        with pytest.raises(ValueError, match=r"network\.depth: 1 .*share_encoder"):
            NetworkConfig(share_encoder=True, depth=1)

    def test_the_replay_holds_more_than_a_window_of_every_environment(self):
        with pytest.raises(ValueError, match=r"replay\.capacity: 6 .* above n_step x envs_per_task = 6"):
            Config(sac=SacConfig(n_step=3), envs=EnvsConfig(envs_per_task=2), replay=ReplayConfig(capacity=6))
        Config(sac=SacConfig(n_step=3), envs=EnvsConfig(envs_per_task=2), replay=ReplayConfig(capacity=8))

    def test_a_configuration_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Config().seed = 2  # pyright: ignore[reportAttributeAccessIssue]


class TestDerived:
    @pytest.mark.parametrize(("envs_per_task", "action_repeat", "steps"), [(1, 1, 1), (3, 2, 6)])
    def test_simulator_steps_per_task_of_a_vector_step(self, envs_per_task, action_repeat, steps):
        assert Config(envs=EnvsConfig(envs_per_task=envs_per_task, action_repeat=action_repeat)).vector_step == steps

    @pytest.mark.parametrize(
        ("fields", "protocol"),
        [
            ({}, "metaworld-plus"),
            (
                {"reward": "v1", "goals": 1, "horizon": 150, "reward_normalization": "ema"},
                "cagrad (v1 reward on v3 environments)",
            ),
            ({"reward": "v1", "goals": 1, "horizon": 150}, "custom (v1 reward, horizon 150, 1 goals)"),
            ({"reward_normalization": "ema"}, "custom (v2 reward, normalised, horizon 500, 50 goals)"),
            ({"goals": 10}, "custom (v2 reward, horizon 500, 10 goals)"),
            ({"horizon": 200}, "custom (v2 reward, horizon 200, 50 goals)"),
            ({"reward": "v1"}, "custom (v1 reward, horizon 500, 50 goals)"),
        ],
        ids=["default", "cagrad", "cagrad's raw rewards", "normalised rewards", "fewer goals", "shorter", "v1 reward"],
    )
    def test_the_protocol_follows_from_the_fields(self, fields, protocol):
        fields = dict(fields)
        evaluation = EvalConfig(horizon=fields.pop("horizon", 500))
        envs = EnvsConfig(reward_normalization=fields.pop("reward_normalization", "none"))
        assert Config(benchmark=BenchmarkConfig(**fields), envs=envs, eval=evaluation).protocol == protocol

    def test_training_episodes_do_not_change_the_protocol(self):
        assert Config(envs=EnvsConfig(horizon=200, action_repeat=2)).protocol == "metaworld-plus"

    @pytest.mark.parametrize("name", list(AGGREGATORS))
    def test_names_of_aggregators(self, name):
        assert aggregator_name(AGGREGATORS[name]()) == name

    def test_the_name_of_a_users_aggregator_is_its_import_path(self):
        assert aggregator_name(Half()) == f"{__name__}:Half"
        assert from_dict(to_dict(Config(aggregator=Half(factor=0.25)))).aggregator == Half(factor=0.25)


class TestRoundTrip:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_shipped_configuration(self, path):
        config = parse_config(["--config", str(path)])
        plain = yaml.safe_load(yaml.safe_dump(to_dict(config)))
        assert to_dict(from_dict(plain)) == to_dict(config)
        assert json.loads(json.dumps(plain)) == plain

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_shipped_configuration_says_what_it_is(self, path):
        assert path.read_text().startswith("# ")

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_value_of_a_shipped_configuration_arrives(self, path):
        def leaves(plain, prefix=()):
            for key, value in plain.items():
                yield from leaves(value, (*prefix, key)) if isinstance(value, dict) else [((*prefix, key), value)]

        config = to_dict(parse_config(["--config", path.stem]))
        for keys, value in leaves(yaml.safe_load(path.read_text())):
            found = config
            for key in keys:
                found = found[key]
            assert found == (float(value) if isinstance(found, float) else value), ".".join(keys)

    def test_values_other_than_the_defaults(self):
        config = Config(
            seed=7,
            run_dir="some where/run",
            benchmark=BenchmarkConfig(tasks=("reach-v3", "push-v3"), reward="v1"),
            aggregator=CAGrad(c=0.75),
            envs=EnvsConfig(goal_seed=0),
            sac=SacConfig(actor_lr=1e-5, target_entropy=-1.5, shared_temperature=True),
        )
        plain = yaml.safe_load(yaml.safe_dump(to_dict(config)))
        assert from_dict(plain) == config
        # The same through the command line's YAML overlays.
        assert to_dict(parse_config([], base=plain)) == to_dict(config)

    @pytest.mark.parametrize(
        ("plain", "name"),
        [
            ({"sead": 3}, "sead"),
            ({"sac": {"stepz": 3}}, r"sac\.stepz"),
            ({"aggregator": {"name": "mean", "c": 3}}, r"aggregator\.c"),
            ({"aggregator": {"name": "meen"}}, "aggregator"),
            ({"sac": {"gamma": 3}}, r"sac\.gamma"),
        ],
        ids=["field", "entry of a section", "field of a rule", "rule", "value"],
    )
    def test_what_is_unknown_is_refused_by_its_name(self, plain, name):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            from_dict(plain)


def test_the_quick_and_the_classic_setting_differ_by_yaml_alone(tmp_path):
    """Laid over the quick start, the defaults as YAML give the classic setting, field by field, and the other way."""
    quick, classic = parse_config(["--config", "quickstart"]), Config()
    assert (classic.sac.n_step, classic.sac.initial_temperature, classic.sac.target_entropy) == (1, 1.0, -4.0)
    assert to_dict(quick) != to_dict(classic)
    for below, above in ((quick, classic), (classic, quick)):
        for name, config in (("below", below), ("above", above)):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(to_dict(config)))
        found = parse_config([f"--config={tmp_path / 'below.yaml'}", f"--config={tmp_path / 'above.yaml'}"])
        assert to_dict(found) == to_dict(above)


def test_the_shipped_settings_are_those_of_their_sources():
    """Meta-World+ (3 x 400, batch 128 per task, 2e6 steps per task) and CAGrad's MT10 command (c = 0.9, one goal)."""
    for name, tasks in (("mt10", ("MT10",)), ("mt50", ("MT50",))):
        config = parse_config(["--config", name])
        assert (config.benchmark.tasks, config.protocol) == (tasks, "metaworld-plus")
        assert (config.network.width, config.network.depth) == (400, 3)
        sac = config.sac
        assert (sac.batch_per_task, sac.steps, sac.gamma, sac.tau, sac.actor_lr) == (128, 2_000_000, 0.99, 0.005, 3e-4)
    cagrad = parse_config(["--config", "mt10_cagrad"])
    assert cagrad.protocol.startswith("cagrad")
    assert cagrad.aggregator == CAGrad(c=0.9)
    assert (cagrad.network.task_input, cagrad.sac.shared_temperature) == ("none", True)
    assert (cagrad.envs.horizon, cagrad.envs.reward_normalization) == (150, "ema")
