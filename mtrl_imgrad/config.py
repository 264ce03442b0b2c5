"""What can be configured: frozen dataclasses, each field with its unit, its default and one sentence.

A `Config` is made from YAML overlays and command-line flags by `mtrl_imgrad.overlays`, or directly in Python. Every
interval is in *simulator steps per task*: one vector step advances it by `envs_per_task * action_repeat`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from mtrl_imgrad.aggregators import AGGREGATORS, Aggregator, IMGrad, resolve


def _require(holds: bool, name: str, given: object, allowed: str) -> None:
    """Raise the one-line ValueError of a bad field."""
    if not holds:
        raise ValueError(f"{name}: {given!r} is not allowed; it must be {allowed}.")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Which tasks, under which reward and goals."""

    tasks: tuple[str, ...] = ("MT10",)
    """Task names (reach-v3) or task sets (MT10, MT25, MT50), in the order of the network's task index."""
    reward: Literal["v1", "v2"] = "v2"
    """Meta-World's reward function version; training and evaluation use the same."""
    goals: int = 50
    """Goals per task, used for training and evaluation: the first n of Meta-World's 50."""

    def __post_init__(self) -> None:
        _require(len(self.tasks) > 0, "benchmark.tasks", self.tasks, "at least one task or task set")
        _require(1 <= self.goals <= 50, "benchmark.goals", self.goals, "between 1 and 50")


@dataclass(frozen=True)
class EnvsConfig:
    """The training environments."""

    envs_per_task: int = 1
    """Environments stepped per task; each has its own random stream and its own ring in the replay."""
    horizon: int = 500
    """Training episode length in simulator steps (at most Meta-World's 500); its end is a truncation and bootstraps."""
    action_repeat: int = 1
    """Simulator steps per decision; rewards are summed, and gamma is per decision. Evaluation uses the same."""
    seeding: Literal["spawn", "metaworld"] = "spawn"
    """spawn: every environment draws goals from its own stream; metaworld: every task draws the same goal indices, as
    Meta-World does."""
    goal_seed: int | None = None
    """Seed of the goal positions; None takes the run's seed, as Meta-World does."""
    reward_normalization: Literal["none", "ema"] = "none"
    """ema: divide each task's reward by the root of its exponential moving variance before storing it, as mtrl does
    (rate 0.001)."""
    workers: int | None = None
    """Processes that step the tasks; None takes one per core and at most one per task (none on a single core), 0 steps
    in the main process. The numbers do not depend on it."""
    fast: bool = True
    """Step without the Python around Meta-World's physics and reward, bit for bit the same; false steps as Meta-World
    does."""
    self_check: Literal["on", "off"] = "on"
    """on: compare some fast steps of each task with Meta-World's own when the run starts; a task that differs is
    stepped as Meta-World does, and named."""
    pipeline: bool = False
    """Update while the environments step, which takes workers. Each vector step's transitions then reach the replay
    after its update instead of before, with or without them."""

    def __post_init__(self) -> None:
        _require(self.workers is None or self.workers >= 0, "envs.workers", self.workers, "zero, positive or None")
        seed_fits = self.goal_seed is None or 0 <= self.goal_seed < 2**32
        _require(seed_fits, "envs.goal_seed", self.goal_seed, "between 0 and 2**32 - 1")
        _require(self.envs_per_task >= 1, "envs.envs_per_task", self.envs_per_task, "at least 1")
        _require(1 <= self.horizon <= 500, "envs.horizon", self.horizon, "between 1 and 500")
        _require(
            1 <= self.action_repeat <= self.horizon,
            "envs.action_repeat",
            self.action_repeat,
            "between 1 and the horizon",
        )


@dataclass(frozen=True)
class NetworkConfig:
    """Actor and critics."""

    kind: Literal["mlp", "multi_head"] = "mlp"
    """mlp: every parameter is shared; multi_head: a shared trunk and one linear head per task."""
    task_input: Literal["one_hot", "none"] = "one_hot"
    """one_hot: the task's one-hot is appended to the observation; none: the trunk is task-blind."""
    width: int = 400
    """Units per hidden layer (Meta-World+ uses 400)."""
    depth: int = 3
    """Hidden layers (Meta-World+ uses 3)."""
    layer_norm: Literal["none", "plain", "affine"] = "none"
    """LayerNorm before each ReLU: plain has no parameters, affine learns a scale and a shift."""
    share_encoder: bool = False
    """One encoder of depth - 1 layers, trained by the critic loss only; actor and critics add their last layer to its
    output."""
    observation_normalization: bool = False
    """Standardise observations per task with running mean and variance, clipped to 10 standard deviations."""
    previous_frame: Literal["raw", "difference"] = "raw"
    """difference: give the previous frame (entries 18-35) as current minus previous, i.e. as a velocity."""
    log_std_min: float = -20.0
    """Lower clip of the policy's log standard deviation (stable-baselines3 uses -20)."""
    log_std_max: float = 2.0
    """Upper clip of the policy's log standard deviation (stable-baselines3 uses 2)."""

    def __post_init__(self) -> None:
        _require(self.width >= 1, "network.width", self.width, "at least 1")
        _require(self.depth >= 1, "network.depth", self.depth, "at least 1")
        _require(
            not (self.share_encoder and self.depth < 2), "network.depth", self.depth, "at least 2 with share_encoder"
        )
        _require(
            self.log_std_min < self.log_std_max, "network.log_std_min", self.log_std_min, "below network.log_std_max"
        )


@dataclass(frozen=True)
class SacConfig:
    """Soft actor-critic (Haarnoja et al. 2018), one loss per task."""

    steps: int = 2_000_000
    """Length of training, in simulator steps per task."""
    warmup: int = 4_000
    """Steps per task with uniformly random actions, before the first update."""
    batch_per_task: int = 128
    """Transitions of each task in one update."""
    updates_per_step: int = 1
    """Gradient updates after each vector step."""
    gamma: float = 0.99
    """Discount factor per decision."""
    n_step: int = 1
    """Rewards summed before the critic's target bootstraps (classic SAC: 1)."""
    tau: float = 0.005
    """Step of the target critics towards the critics, per update."""
    actor_lr: float = 3e-4
    """Adam step size of the actor."""
    critic_lr: float = 3e-4
    """Adam step size of the critics."""
    temperature_lr: float = 3e-4
    """Adam step size of the log temperatures."""
    adam_eps: float = 1e-8
    """Adam's epsilon (torch's default; Meta-World+ uses 1e-5)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay for actor and critics; 0 is Adam."""
    max_grad_norm: float = 0.0
    """Norm clip of the aggregated gradient, actor and critics apart; 0 switches it off."""
    initial_temperature: float = 1.0
    """Initial temperature alpha of every task (classic SAC: 1)."""
    target_entropy: float = -4.0
    """Entropy in nats that the temperature steers each task's policy to (classic SAC: minus the number of action
    entries, -4)."""
    shared_temperature: bool = False
    """One temperature for all tasks instead of one per task."""
    reward_scale: float = 1.0
    """Factor on every reward, applied when a batch is sampled."""
    nan_policy: Literal["raise", "skip"] = "raise"
    """An update with a NaN or an infinity changes nothing, whatever this is. raise: the run ends at the next log row,
    naming task and loss; skip: it goes on and says so, and train/non_finite counts."""
    critic_loss: Literal["squared", "categorical"] = "squared"
    """squared: mean squared error; categorical: HL-Gauss cross-entropy over critic_bins bins (Farebrother et al.
    2024)."""
    critic_bins: int = 61
    """Bins of the categorical critic."""
    critic_min: float = -10.0
    """Lowest value that the categorical critic can express, in scaled reward."""
    critic_max: float = 100.0
    """Highest value that the categorical critic can express, in scaled reward."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_per_task", "updates_per_step", "n_step"):
            _require(getattr(self, name) >= 1, f"sac.{name}", getattr(self, name), "at least 1")
        for name in ("actor_lr", "critic_lr", "temperature_lr", "adam_eps", "initial_temperature", "reward_scale"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"sac.{name}", value, "positive and finite")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"sac.{name}", value, "zero or positive, and finite")
        _require(self.warmup >= 0, "sac.warmup", self.warmup, "zero or positive")
        _require(0 <= self.gamma <= 1, "sac.gamma", self.gamma, "between 0 and 1")
        _require(0 < self.tau <= 1, "sac.tau", self.tau, "above 0 and at most 1")
        _require(math.isfinite(self.target_entropy), "sac.target_entropy", self.target_entropy, "finite")
        _require(self.critic_bins >= 3, "sac.critic_bins", self.critic_bins, "at least 3")
        finite_range = -math.inf < self.critic_min < self.critic_max < math.inf
        _require(finite_range, "sac.critic_min", self.critic_min, "finite and below sac.critic_max")


@dataclass(frozen=True)
class ReplayConfig:
    """The replay on the training device."""

    capacity: int = 100_000
    """Transitions (decisions) kept per task, over all its environments."""

    def __post_init__(self) -> None:
        _require(self.capacity >= 1, "replay.capacity", self.capacity, "at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: deterministic policy, own environments, goals visited without replacement."""

    every: int = 20_000
    """Steps per task between evaluations during training; 0 evaluates at the end only."""
    goals_per_task: int = 5
    """Goals per task in evaluations during training: a fixed, evenly spaced subset. The final evaluation and `evaluate`
    use all."""
    horizon: int = 500
    """Evaluation episode length in simulator steps."""
    final: bool = True
    """Evaluate every goal once per task when training ends."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "eval.every", self.every, "zero or positive")
        _require(1 <= self.goals_per_task <= 50, "eval.goals_per_task", self.goals_per_task, "between 1 and 50")
        _require(1 <= self.horizon <= 500, "eval.horizon", self.horizon, "between 1 and 500")


@dataclass(frozen=True)
class LogConfig:
    """progress.csv, TensorBoard and the console."""

    every: int = 2_000
    """Steps per task between log rows."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Copy what goes to TensorBoard to Weights & Biases, under the run folder's name. Needs the extra `wandb`, heeds
    WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "log.every", self.every, "at least 1")
        _require(self.tensorboard or not self.wandb, "log.wandb", self.wandb, "false without log.tensorboard")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 50_000
    """Steps per task between checkpoints, each taken at the next moment when all episodes end; 0 saves at the end
    only."""
    replay: bool = True
    """Save the replay too, so that `--resume` goes on exactly; without it only evaluation is possible from a
    checkpoint."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", self.every, "zero or positive")


@dataclass(frozen=True)
class Sb3Config:
    """stable-baselines3's SAC, for the algorithms `sb3-sac*` only. Names, meanings and defaults are SB3's own."""

    learning_rate: float = 3e-4
    """Adam step size of actor, critics and temperature."""
    buffer_size: int = 1_000_000
    """Transitions (decisions) kept by one network, over all environments that it learns from."""
    batch_size: int = 256
    """Transitions in one update of one network, drawn from all of its tasks together."""
    tau: float = 0.005
    """Step of the target critics towards the critics, per target update."""
    gamma: float = 0.99
    """Discount factor per decision."""
    gradient_steps: int = 1
    """Updates after each vector step, however many environments it has; -1 makes one for every transition."""
    ent_coef: str = "auto"
    """Temperature: auto learns it from 1, auto_0.1 from 0.1, and a number keeps it."""
    target_update_interval: int = 1
    """Updates between target updates, counted anew after each vector step."""
    target_entropy: str = "auto"
    """Entropy in nats that the temperature steers to; auto is minus the number of action entries."""
    net_arch: tuple[int, ...] = (256, 256)
    """Units of each hidden layer, of the actor and of each critic."""

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate < math.inf, "sb3.learning_rate", self.learning_rate, "positive and finite")
        for name in ("buffer_size", "batch_size", "target_update_interval"):
            _require(getattr(self, name) >= 1, f"sb3.{name}", getattr(self, name), "at least 1")
        steps = self.gradient_steps
        _require(steps >= 1 or steps == -1, "sb3.gradient_steps", steps, "at least 1, or -1")
        _require(0 < self.tau <= 1, "sb3.tau", self.tau, "above 0 and at most 1")
        _require(0 <= self.gamma <= 1, "sb3.gamma", self.gamma, "between 0 and 1")
        coefficient = 1.0 if self.ent_coef == "auto" else _number(self.ent_coef.removeprefix("auto_"))
        _require(0 < coefficient < math.inf, "sb3.ent_coef", self.ent_coef, "auto, auto_X or X, with X above 0")
        entropy = 0.0 if self.target_entropy == "auto" else _number(self.target_entropy)
        _require(math.isfinite(entropy), "sb3.target_entropy", self.target_entropy, "auto or a number")
        layers = len(self.net_arch) > 0 and min(self.net_arch) >= 1
        _require(layers, "sb3.net_arch", self.net_arch, "at least one layer, each of at least 1 unit")


def _number(text: str) -> float:
    """The number that a text is, or NaN."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


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
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2**32 - 1")
        _require(self.threads >= 0, "threads", self.threads, "zero or positive")
        captured = self.compile and self.device != "cpu"
        _require(captured or not self.cuda_graph, "cuda_graph", self.cuda_graph, "false without compile or on the CPU")
        whole = self.jacobian == "stored" or self.aggregator.needs != "jacobian"
        _require(whole, "jacobian", self.jacobian, "stored, since the aggregator needs all of J")
        window = self.sac.n_step * self.envs.envs_per_task
        _require(
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
    own = tuple(f"sac.{f.name}" for f in dataclasses.fields(SacConfig) if f.name not in ("steps", "warmup"))
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
            fields = dict(value)
            values[name] = _build(resolve(fields.pop("name")), name, fields)
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _build(
                hints[name], name, {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
            )
        else:
            values[name] = value
    return Config(**values)


def _build(cls: Any, section: str, fields: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{section}.{unknown[0]}: this version knows no such field.")
    return cls(**fields)
