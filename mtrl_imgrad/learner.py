"""The only owner of parameters, optimisers and aggregators' states: it acts, and it learns by `sac_update`."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mtrl_imgrad.compilation import CapturedUpdate, CompilationError, Update, compile_sac
from mtrl_imgrad.config import Config
from mtrl_imgrad.replay import Batch
from mtrl_imgrad.rewards import observe_returns
from mtrl_imgrad.sac_update import LOSSES, Metrics, Noise, State, build_update
from mtrl_imgrad.saved_state import check_like


class NonFiniteError(ArithmeticError):
    """Training met a NaN or an infinity, and `sac.nan_policy` is `raise`."""


class Learner:
    """Networks, temperatures, optimisers and aggregators of one run.

    Args:
        config: the run's configuration.
        tasks: number of tasks K.
        observation_size, action_size: entries of one observation and action.
        device: where everything lives.
        generator: CPU generator for the initial parameters.
    """

    def __init__(
        self,
        config: Config,
        tasks: int,
        observation_size: int,
        action_size: int,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.config, self.tasks, self.action_size, self.device = config, tasks, action_size, device
        self.sac = build_update(config, tasks, observation_size, action_size)
        self._update: Update = self.sac
        critic = self.sac.critic.layout.initial(generator).to(device)
        actor = self.sac.actor.layout.initial(generator).to(device)
        log_alpha = torch.full((tasks,), math.log(config.sac.initial_temperature), device=device)
        self.state: State = {
            "target_critic": critic.clone(),
            "updates": torch.zeros((), dtype=torch.float64, device=device),
            "non_finite": torch.zeros(len(LOSSES), tasks, dtype=torch.int64, device=device),
            "statistics": self.sac.inputs.initial_statistics(observation_size, device),
            "noise": torch.zeros(tasks, config.envs.envs_per_task, action_size, device=device),
            "random_left": torch.zeros(tasks, config.envs.envs_per_task, device=device),
            "returns": torch.zeros(tasks, config.envs.envs_per_task, dtype=torch.float64, device=device),
            "return_size": torch.zeros(tasks, dtype=torch.float64, device=device),
            "return_steps": torch.zeros((), dtype=torch.float64, device=device),
        }
        for name, vector in (("critic", critic), ("actor", actor), ("log_alpha", log_alpha)):
            self.state |= {name: vector, f"{name}/m": torch.zeros_like(vector), f"{name}/v": torch.zeros_like(vector)}
        for name, network in (("critic", self.sac.critic), ("actor", self.sac.actor)):
            rule = self.sac.rules[name]
            parameters = network.layout.shared_size if rule.needs == "jacobian" else 0
            initial = rule.initial_state((tasks,), parameters)
            self.state |= {f"{name}/rule/{key}": value.to(device) for key, value in initial.items()}

    @property
    def non_finite(self) -> Int[Tensor, "losses tasks"]:
        """How often each loss (a row of `LOSSES`) of each task was not finite."""
        return self.state["non_finite"]

    def observe(self, observations: Float[Tensor, "tasks envs entries"]) -> None:
        """Take observations from the environments into the running statistics."""
        if self.sac.inputs.normalization:
            self.sac.inputs.observe(self.state["statistics"], observations)

    def observe_rewards(self, rewards: Float[Tensor, "tasks envs"], ended: Bool[Tensor, "tasks envs"]) -> None:
        """Take the rewards of a vector step, and where they ended an episode, into the returns that scale them."""
        sac, state = self.config.sac, self.state
        if sac.return_scaling != "none":
            returns, size, steps = (state[name] for name in ("returns", "return_size", "return_steps"))
            observe_returns(returns, size, steps, rewards, ended, sac.gamma, sac.return_scaling)

    def explore(self, white: Float[Tensor, "tasks envs actions"]) -> Float[Tensor, "tasks envs actions"]:
        """The noise of the next decision, from standard normal numbers and the noise of the one before: an AR(1)
        process with standard normal values. It goes on over the end of an episode."""
        rho = self.config.sac.noise_correlation
        return self.state["noise"].mul_(rho).add_(white, alpha=math.sqrt(1 - rho**2))

    def start_at_random(
        self, actions: Float[Tensor, "tasks envs actions"], noise: Float[Tensor, "tasks envs actions"]
    ) -> Float[Tensor, "tasks envs actions"]:
        """The actions, but for those of episodes whose random decisions are not over: there the noise, mapped to the
        uniform distribution."""
        left = self.state["random_left"]
        chosen = torch.where(left[..., None] > 0, torch.erf(noise / math.sqrt(2)), actions)
        left.sub_(1).clamp_(min=0)
        return chosen

    def observe_ends(self, ended: Bool[Tensor, "tasks envs"], uniform: Float[Tensor, "tasks envs"]) -> None:
        """Draw, from numbers in [0, 1), how many random decisions the next episodes begin with, where one has ended."""
        left = self.state["random_left"]
        left.copy_(torch.where(ended, (uniform * (self.config.sac.random_start + 1)).floor(), left))

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "tasks rows entries"], noise: Float[Tensor, "tasks rows actions"] | None
    ) -> Float[Tensor, "tasks rows actions"]:
        """Actions in [-1, 1]: sampled with the given standard normal noise, or the mean's tanh where it is None."""
        inputs = self.sac.inputs(self.state["statistics"], observations)
        encoding = self.sac.critic.encode(self.state["critic"], inputs)
        mean, log_std = self.sac.actor(self.state["actor"], encoding)
        return torch.tanh(mean if noise is None else mean + log_std.exp() * noise)

    def draw_noise(self, policy: torch.Generator, aggregation: torch.Generator) -> Noise:
        """The random numbers of the next update, each from its own stream."""
        shape = (2, self.tasks, self.config.sac.batch_per_task, self.action_size)
        return Noise(
            torch.randn(shape, generator=policy, device=self.device),
            self.sac.rules["critic"].draw_noise(self.tasks, aggregation, self.sac.critic.layout.shared_size),
            self.sac.rules["actor"].draw_noise(self.tasks, aggregation, self.sac.actor.layout.shared_size),
        )

    def update(self, batch: Batch, noise: Noise) -> Metrics:
        """One update of everything, from `B` transitions of each task."""
        new, metrics = self._update(self.state, batch, noise)
        self.state |= new
        return metrics

    def compile(self) -> str | None:
        """Compile the update for batches of the configured size.

        Returns:
            None, or in one line why there is no compiled update; `update` goes on as before then.
        """
        rows, entries = self.config.sac.batch_per_task, self.state["statistics"].shape[-1]

        def zeros(*last: int) -> Tensor:
            return torch.zeros(self.tasks, rows, *last, device=self.device)

        batch = Batch(zeros(entries), zeros(self.action_size), zeros(), zeros(entries), zeros())
        generator = torch.Generator(self.device)
        noise = self.draw_noise(generator, generator)
        try:
            compiled = compile_sac(self.sac, self.state, batch, noise)
        except CompilationError as error:
            return str(error)
        captures = self.config.cuda_graph and self.device.type == "cuda"
        self._update = CapturedUpdate(compiled, self.state, batch, noise) if captures else compiled
        return None

    def parameter_counts(self) -> tuple[int, int]:
        """Parameters of actor and critics: shared between tasks, and belonging to one task."""
        layouts = (self.sac.actor.layout, self.sac.critic.layout)
        return sum(x.shared_size for x in layouts), sum(x.size - x.shared_size for x in layouts)

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter of actor and critics, `<network>/<name>`, as a view."""
        networks = {"actor": self.sac.actor, "critic": self.sac.critic}
        return {
            f"{network}/{name}": view
            for network, function in networks.items()
            for name, view in function.layout.views(self.state[network]).items()
        }

    def state_dict(self) -> State:
        """Everything that training changes, by name."""
        return dict(self.state)

    def load_state_dict(self, state: State) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: a name, shape or type differs, e.g. because the networks differ.
        """
        check_like(state, self.state)
        for name, value in self.state.items():
            value.copy_(state[name])
