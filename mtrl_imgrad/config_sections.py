"""The sections of a `Config`: frozen dataclasses, each field with its unit, its default and one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

MOST_STEPS = 10**15
"""Simulator steps that no run reaches, and that every counter holds. The other upper limits too are far above what is
of use: they tell a slip of the keyboard before memory runs out."""


def require(holds: bool, name: str, given: object, allowed: str) -> None:
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
        require(len(self.tasks) > 0, "benchmark.tasks", self.tasks, "at least one task or task set")
        require(1 <= self.goals <= 50, "benchmark.goals", self.goals, "between 1 and 50")


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
        workers_fit = self.workers is None or 0 <= self.workers <= 1024
        require(workers_fit, "envs.workers", self.workers, "between 0 and 1024, or None")
        seed_fits = self.goal_seed is None or 0 <= self.goal_seed < 2**32
        require(seed_fits, "envs.goal_seed", self.goal_seed, "between 0 and 2**32 - 1")
        require(1 <= self.envs_per_task <= 4096, "envs.envs_per_task", self.envs_per_task, "between 1 and 4096")
        require(1 <= self.horizon <= 500, "envs.horizon", self.horizon, "between 1 and 500")
        require(
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
        require(1 <= self.width <= 16_384, "network.width", self.width, "between 1 and 16384")
        require(1 <= self.depth <= 100, "network.depth", self.depth, "between 1 and 100")
        require(
            not (self.share_encoder and self.depth < 2), "network.depth", self.depth, "at least 2 with share_encoder"
        )
        finite = -math.inf < self.log_std_min < self.log_std_max < math.inf
        given = (self.log_std_min, self.log_std_max)
        require(finite, "network.log_std_min, network.log_std_max", given, "finite, the first below the second")


@dataclass(frozen=True)
class SacConfig:
    """Soft actor-critic (Haarnoja et al. 2018), one loss per task."""

    steps: int = 2_000_000
    """Length of training, in simulator steps per task."""
    warmup: int = 4_000
    """Steps per task with uniformly random actions, before the first update."""
    batch_per_task: int = 128
    """Transitions of each task in one update."""
    noise_correlation: float = 0.0
    """Correlation rho of the policy's noise from one decision to the next, in training: n <- rho n + sqrt(1 - rho^2) w
    with w standard normal, and so is n. 0 is SAC's white noise; correlated noise explores further. A discretised
    Ornstein-Uhlenbeck process, as DDPG's (Lillicrap et al. 2016), in the place of SAC's own noise as Eberhard et al.
    (2023) do it; they prefer pink noise to it, which one number of state per action entry cannot give."""
    random_start: int = 0
    """Most decisions at the start of a training episode that are uniformly random instead of the policy's, correlated
    as its noise is. Each episode but the first draws its number between 0 and this, so that the policy finds itself in
    other places than those that it seeks. We know of no source for it. An episode shorter than its number is random
    from end to end."""
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
    min_temperature: float = 0.0
    """Lower bound of every temperature. Where values hardly differ between actions, a temperature at its bound lets the
    policy's entropy rise above target_entropy. We know of no source for it."""
    target_entropy: float = -4.0
    """Entropy in nats that the temperature steers each task's policy to (classic SAC: minus the number of action
    entries, -4)."""
    shared_temperature: bool = False
    """One temperature for all tasks instead of one per task."""
    reward_scale: float = 1.0
    """Factor on every reward, applied when a batch is sampled."""
    return_scaling: Literal["none", "largest", "rms"] = "none"
    """Divide each task's rewards by a size of the discounted returns that the task has shown so far, when a batch is
    sampled and before reward_scale, so that all tasks' values have one size: their largest (after BRC and SimbaV2), or
    their root mean square."""
    nan_policy: Literal["raise", "skip"] = "raise"
    """A NaN or an infinity never gets into parameters, statistics or the replay, whatever this is. raise: the run ends,
    naming task and loss (at the next log row), or task, environment, goal and step of a transition whose reward or
    observation is not finite, or in which MuJoCo's simulation became unstable. skip: the update changes nothing, the
    transition is not stored and its episode starts over, and the run goes on, says so, and counts in train/non_finite
    and rollout/non_finite. stable-baselines3's SAC heeds it for transitions; its losses always end the run."""
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
        require(1 <= self.steps <= MOST_STEPS, "sac.steps", self.steps, f"between 1 and {MOST_STEPS}")
        require(0 <= self.random_start <= 1000, "sac.random_start", self.random_start, "between 0 and 1000")
        for name, most in (("batch_per_task", 2**20), ("updates_per_step", 10_000), ("n_step", 1000)):
            require(1 <= getattr(self, name) <= most, f"sac.{name}", getattr(self, name), f"between 1 and {most}")
        for name in ("actor_lr", "critic_lr", "temperature_lr", "adam_eps", "initial_temperature", "reward_scale"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"sac.{name}", value, "positive and finite")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"sac.{name}", value, "zero or positive, and finite")
        require(0 <= self.warmup <= MOST_STEPS, "sac.warmup", self.warmup, f"between 0 and {MOST_STEPS}")
        require(0 <= self.gamma <= 1, "sac.gamma", self.gamma, "between 0 and 1")
        bounded = 0 <= self.min_temperature <= self.initial_temperature
        require(bounded, "sac.min_temperature", self.min_temperature, "between 0 and sac.initial_temperature")
        correlation = self.noise_correlation
        require(0 <= correlation < 1, "sac.noise_correlation", correlation, "at least 0 and below 1")
        require(0 < self.tau <= 1, "sac.tau", self.tau, "above 0 and at most 1")
        require(math.isfinite(self.target_entropy), "sac.target_entropy", self.target_entropy, "finite")
        require(3 <= self.critic_bins <= 10_000, "sac.critic_bins", self.critic_bins, "between 3 and 10000")
        finite = -math.inf < self.critic_min < self.critic_max < math.inf
        given = (self.critic_min, self.critic_max)
        require(finite, "sac.critic_min, sac.critic_max", given, "finite, the first below the second")


@dataclass(frozen=True)
class ReplayConfig:
    """The replay on the training device."""

    capacity: int = 100_000
    """Transitions (decisions) kept per task, over all its environments."""

    def __post_init__(self) -> None:
        require(1 <= self.capacity <= MOST_STEPS, "replay.capacity", self.capacity, f"between 1 and {MOST_STEPS}")


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
        require(0 <= self.every <= MOST_STEPS, "eval.every", self.every, f"between 0 and {MOST_STEPS}")
        require(1 <= self.goals_per_task <= 50, "eval.goals_per_task", self.goals_per_task, "between 1 and 50")
        require(1 <= self.horizon <= 500, "eval.horizon", self.horizon, "between 1 and 500")


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
        require(1 <= self.every <= MOST_STEPS, "log.every", self.every, f"between 1 and {MOST_STEPS}")
        require(self.tensorboard or not self.wandb, "log.wandb", self.wandb, "false without log.tensorboard")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 50_000
    """Steps per task between checkpoints; 0 saves at the end only, and when SIGINT or SIGTERM ends the run."""
    keep_every: int = 0
    """Keep, without the replay, the first checkpoint in each of these intervals of steps per task; 0 keeps the two
    newest and the best only."""
    replay: bool = True
    """Save the replay too, so that `--resume` goes on exactly; without it only evaluation is possible from a
    checkpoint."""

    def __post_init__(self) -> None:
        require(0 <= self.every <= MOST_STEPS, "checkpoint.every", self.every, f"between 0 and {MOST_STEPS}")
        require(
            0 <= self.keep_every <= MOST_STEPS, "checkpoint.keep_every", self.keep_every, f"between 0 and {MOST_STEPS}"
        )


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
        require(0 < self.learning_rate < math.inf, "sb3.learning_rate", self.learning_rate, "positive and finite")
        for name, most in (("buffer_size", MOST_STEPS), ("batch_size", 2**20), ("target_update_interval", MOST_STEPS)):
            require(1 <= getattr(self, name) <= most, f"sb3.{name}", getattr(self, name), f"between 1 and {most}")
        steps = self.gradient_steps
        require(1 <= steps <= 10_000 or steps == -1, "sb3.gradient_steps", steps, "between 1 and 10000, or -1")
        require(0 < self.tau <= 1, "sb3.tau", self.tau, "above 0 and at most 1")
        require(0 <= self.gamma <= 1, "sb3.gamma", self.gamma, "between 0 and 1")
        coefficient = 1.0 if self.ent_coef == "auto" else _number(self.ent_coef.removeprefix("auto_"))
        require(0 < coefficient < math.inf, "sb3.ent_coef", self.ent_coef, "auto, auto_X or X, with X above 0")
        entropy = 0.0 if self.target_entropy == "auto" else _number(self.target_entropy)
        require(math.isfinite(entropy), "sb3.target_entropy", self.target_entropy, "auto or a number")
        layers = 1 <= len(self.net_arch) <= 100 and min(self.net_arch) >= 1 and max(self.net_arch) <= 16_384
        require(layers, "sb3.net_arch", self.net_arch, "1 to 100 layers, each of 1 to 16384 units")


def _number(text: str) -> float:
    """The number that a text is, or NaN."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
