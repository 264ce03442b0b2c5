"""What can be configured: `Config`, made of sections, and how it is written down and read back.

A `Config` is made from YAML overlays and command-line flags by `mtrl_imgrad.overlays`, or directly in Python. Every
interval is in *simulator steps per task*: one vector step advances it by `envs_per_task * action_repeat`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregator, IMGrad, resolve
from mtrl_imgrad.config_sections import (
    BenchmarkConfig,
    CheckpointConfig,
    EnvsConfig,
    EvalConfig,
    LogConfig,
    NetworkConfig,
    ReplayConfig,
    SacConfig,
    Sb3Config,
    require,
)
from mtrl_imgrad.field_types import check_types

Baseline = Literal["sb3-sac", "sb3-sac-blind", "sb3-sac-single"]
BASELINES: tuple[str, ...] = get_args(Baseline)
"""Algorithms that are not ours."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    algorithm: Literal["mtsac"] | Baseline = "mtsac"
    """What learns. mtsac: multi-task SAC with an aggregator; the others are stable-baselines3's SAC as a baseline.
    sb3-sac: one for all tasks, which sees the task's one-hot; sb3-sac-blind: one that does not see it; sb3-sac-single:
    one per task."""
    seed: int = 1
    """Seed of everything random in the run."""
    run_dir: str = ""
    """Run folder; empty makes runs/<benchmark>-<method>-s<seed>, numbered where that exists; the method is the
    aggregator or the baseline."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Training device; auto is cuda where there is one, else cpu."""
    threads: int = 0
    """CPU threads of torch; 0 takes torch's own choice."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the matrix products; weights, losses, Gramians and optimisers stay float32 or float64. auto is
    float32, until bfloat16 is shown to learn as well."""
    jacobian: Literal["stored", "chunked"] = "stored"
    """stored: keep all K gradients of the shared parameters until the direction is known; chunked: make them piece by
    piece for the Gramian, and the direction by another product: less memory, for rules that need no J."""
    compile: bool = True
    """Compile the whole update into one graph when training starts, which takes half a minute once and a few seconds in
    later runs (TORCHINDUCTOR_CACHE_DIR says where torch keeps it). Where it fails, as without a C++ compiler, the run
    says so and goes on without."""
    cuda_graph: bool = False
    """Launch the whole compiled update as one CUDA graph; GPU only."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    aggregator: Aggregator = field(default_factory=IMGrad)
    envs: EnvsConfig = field(default_factory=EnvsConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    sac: SacConfig = field(default_factory=SacConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    sb3: Sb3Config = field(default_factory=Sb3Config)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2**32 - 1")
        require(0 <= self.threads <= 1024, "threads", self.threads, "between 0 and 1024")
        captured = self.compile and self.device != "cpu"
        require(captured or not self.cuda_graph, "cuda_graph", self.cuda_graph, "false without compile or on the CPU")
        whole = self.jacobian == "stored" or self.aggregator.needs != "jacobian"
        require(whole, "jacobian", self.jacobian, "stored, since the aggregator needs all of J")
        window = self.sac.n_step * self.envs.envs_per_task
        require(
            self.replay.capacity > window,
            "replay.capacity",
            self.replay.capacity,
            f"above n_step x envs_per_task = {window}",
        )

    @property
    def vector_step(self) -> int:
        """Simulator steps per task in one vector step."""
        return self.envs.envs_per_task * self.envs.action_repeat

    def steps_from(self, start: int) -> range:
        """Simulator steps per task after each vector step still to be taken."""
        return range(start + self.vector_step, self.sac.steps + 1, self.vector_step)

    def due(self, every: int, step: int) -> bool:
        """Whether the vector step that ends at `step` reached a multiple of `every`; never for 0."""
        return every > 0 and step // every > (step - self.vector_step) // every

    @property
    def protocol(self) -> str:
        """Name of the evaluation protocol, derived from the fields so that it cannot be wrong (DESIGN.md rule 8)."""
        shown = (self.benchmark.reward, self.eval.horizon, self.benchmark.goals)
        named = {("v2", 500, 50): "metaworld-plus", ("v1", 150, 1): "cagrad (v1 reward on v3 environments)"}
        normalized = self.envs.reward_normalization == "ema"  # part of the second protocol, foreign to the first
        if shown in named and normalized == (shown[0] == "v1"):
            return named[shown]
        reward, horizon, goals = shown
        return f"custom ({reward} reward{', normalised' * normalized}, horizon {horizon}, {goals} goals)"


def unused_fields(algorithm: str) -> tuple[str, ...]:
    """Fields and whole sections that an algorithm does not read. What describes the experiment (tasks, goals, reward,
    environments, length, warm-up, evaluation, reports, seed, device) is read by all of them."""
    if algorithm == "mtsac":
        return ("sb3",)
    shared = ("steps", "warmup", "nan_policy")
    own = tuple(f"sac.{f.name}" for f in dataclasses.fields(SacConfig) if f.name not in shared)
    graph = ("precision", "jacobian", "compile", "cuda_graph", "envs.pipeline")
    return ("aggregator", "network", "replay", *graph, *own)


def uses(algorithm: str, name: str) -> bool:
    """Whether an algorithm reads a field, given by its dotted name."""
    return not any(f"{name}.".startswith(f"{unused}.") for unused in unused_fields(algorithm))


def method_name(config: Config) -> str:
    """What tables and run folders call the run's method: its aggregator, or the baseline."""
    return aggregator_name(config.aggregator) if config.algorithm == "mtsac" else config.algorithm


def aggregator_name(rule: Aggregator) -> str:
    """The registry name of a rule, `torchjd:Name`, or its import path `module:Class`.

    Raises:
        ValueError: no other process could make the rule again.
    """
    for name, cls in AGGREGATORS.items():
        if type(rule) is cls:
            return name
    if type(rule).__module__ == "__main__":
        raise ValueError(f"aggregator: {type(rule).__qualname__} is defined in a script; a run needs it in a module.")
    if type(rule).__module__ == "mtrl_imgrad.aggregators.torchjd":
        if type(rule).__name__ == "Wrapped":
            raise ValueError(f"aggregator: {rule!r} cannot be written down; use one that plain parameters describe.")
        return f"torchjd:{type(rule).__name__}"
    return f"{type(rule).__module__}:{type(rule).__qualname__}"


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary of a config, as written to `config.yaml`; `from_dict` reads it back."""
    plain: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Aggregator):
            rule = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # pyright: ignore[reportArgumentType]
            plain[item.name] = {"name": aggregator_name(value), **rule}
        elif dataclasses.is_dataclass(value):
            section = dataclasses.asdict(value)  # pyright: ignore[reportArgumentType]
            plain[item.name] = {k: list(v) if isinstance(v, tuple) else v for k, v in section.items()}
        else:
            plain[item.name] = value
    return plain


def from_dict(plain: dict[str, Any]) -> Config:
    """Rebuild a config from `to_dict`'s output.

    Raises:
        ValueError: a section or field is unknown, or a value is not allowed.
    """
    hints = get_type_hints(Config)
    values: dict[str, Any] = {}
    for name, value in plain.items():
        if name not in hints:
            raise ValueError(f"{name}: this version knows no such field.")
        if name == "aggregator":
            fields = dict(_mapping(name, value))
            method = fields.pop("name", None)
            if not isinstance(method, str):
                raise ValueError(f"aggregator.name: {method!r} is not allowed; it must be the name of a rule.")
            values[name] = _build(resolve(method), name, fields)
        elif dataclasses.is_dataclass(hints[name]):
            plain_fields = _mapping(name, value).items()
            values[name] = _build(
                hints[name], name, {k: tuple(v) if isinstance(v, list) else v for k, v in plain_fields}
            )
        else:
            values[name] = value
    check_types(Config, "", values)
    return Config(**values)


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} is not allowed; it must be a mapping of this section's fields.")
    return value


def _build(cls: Any, section: str, fields: dict[str, Any]) -> Any:
    check_types(cls, f"{section}.", fields)
    return cls(**fields)
