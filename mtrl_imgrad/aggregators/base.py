"""What an aggregation rule is, and the one pre-step that every rule shares.

To write a rule, subclass `Aggregator` as a dataclass and implement `solve`:

    @dataclass(frozen=True)
    class InverseNorm(Aggregator):
        \"\"\"Weights proportional to 1 / ||g_i||.\"\"\"

        power: float = 1.0
        \"\"\"Exponent of the norm.\"\"\"

        def solve(self, given):
            norms = given.gramian.diagonal(dim1=-2, dim2=-1).sqrt()
            weights = torch.where(given.active, norms, 1.0).pow(-self.power) * given.active
            return Aggregation(weights / weights.sum(-1, keepdim=True))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Sums of products in float32 are off by up to this many times its resolution, for some 10^5 of them on a CPU.
FLOAT32_SUMS = 64
# A task whose gradient norm is below this fraction of the root mean square norm counts as having no gradient.
ZERO_NORM = 1e-12

State: TypeAlias = dict[str, Tensor]
"""What a rule remembers between calls, by name."""
Needs: TypeAlias = Literal["gramian", "jacobian", "losses"]


@dataclass(frozen=True)
class Given:
    """What a rule is given, all on one device."""

    gramian: Float[Tensor, "*batch tasks tasks"]
    """M = J J^T, float64, finite, symmetric, divided by its mean diagonal; rows and columns of inactive tasks are
    exactly 0."""

    active: Bool[Tensor, "*batch tasks"]
    """Tasks with a gradient, at least one per Gramian; inactive tasks get weight 0 whatever is returned."""

    scale: Float[Tensor, "*batch"]
    """The mean diagonal that M was divided by, for rules whose weights depend on the gradients' scale."""

    noise: Tensor | None = None
    """What `draw_noise` returned."""

    losses: Float[Tensor, "*batch tasks"] | None = None
    """The tasks' losses, float64; for rules with `needs = "losses"`, and for those that ask for J and losses."""

    jacobian: Float[Tensor, "tasks parameters"] | None = None
    """J itself, in the gradients' dtype and scale; for rules with `needs = "jacobian"`. Never batched."""

    state: State = field(default_factory=dict)
    """What the last call left in `Aggregation.state`, or `initial_state`."""

    rounding: float = torch.finfo(torch.float64).eps
    """How well M is known: M_ij to about this times ||g_i|| ||g_j||. What M says of directions shorter than that is
    noise."""


@dataclass(frozen=True)
class Aggregation:
    """What a rule returns."""

    weights: Float[Tensor, "*batch tasks"]
    """float64 row weights of the direction d = J^T weights; the 1/K part, radii and rescaling are included. For rules
    that return `direction`, weights worth logging."""

    diagnostics: dict[str, Float[Tensor, "*batch"]] = field(default_factory=dict)
    """Scalars of this call worth logging, each of shape [*batch]."""

    state: State = field(default_factory=dict)
    """What the next call is to see, under the names of `initial_state`; new tensors."""

    own_weights: Float[Tensor, "*batch tasks"] | None = None
    """Weights of the tasks' own parameters' gradients; None means 1/K, the gradient of the mean loss. Rules that weigh
    losses return `weights` here too."""

    direction: Float[Tensor, " parameters"] | None = None
    """The direction itself, where it is no combination of J's rows; in J's dtype."""


class Aggregator(ABC):
    """A rule that turns the per-task gradients g_i, the rows of J, into one direction.

    Subclasses are dataclasses whose fields are the hyper-parameters (float, int, bool, str or Literal), because the
    command line is built from them. Directions are on the mean scale unless a rule says otherwise: K identical
    gradients g give g times a constant the rule names.

    Training uses the pure `aggregate`, and keeps the rule's state itself. Called as a function, an object keeps its own
    state, see `state_dict`.
    """

    needs: ClassVar[Needs] = "gramian"
    """What a call must be given besides the Gramian."""

    paper: ClassVar[str] = ""
    """The source, as `mtrl-imgrad list aggregators` shows it."""

    critic_only: ClassVar[bool] = False
    """Whether training applies the rule to the critics alone, and the mean to the actor: rules that take a loss for a
    distance from zero, which an actor's loss is not. A task whose loss is negative or not finite gets the weight
    NaN."""

    sees_new_losses: ClassVar[bool] = False
    """Whether `after_step` wants the losses on the same batch after the step."""

    preconditioned: ClassVar[bool] = False
    """Whether the direction is a step as Adam would take it, to be multiplied by the learning rate alone."""

    @abstractmethod
    def solve(self, given: Given) -> Aggregation:
        """The rule itself. It must not copy device tensors to the host."""

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        """What a rule remembers before its first call, on the CPU.

        Args:
            shape: `[*batch, tasks]`.
            parameters: columns of J, 0 where the rule is called without it.
        """
        return {}

    def draw_noise(
        self, num_tasks: int, generator: torch.Generator | None = None, parameters: int = 0
    ) -> Tensor | None:
        """The random numbers of one call, or None. Training draws them before the update and hands them in."""
        return None

    def after_step(self, state: State, losses: Tensor, new_losses: Tensor) -> State:
        """The state after the step, given the losses before and after it on the same batch; see `sees_new_losses`. Made
        of tensor operations alone, since it is compiled as part of the update."""
        return state

    def check_shapes(self, gramian: Tensor, losses: Tensor | None, jacobian: Tensor | None) -> None:
        """Raises the ValueErrors of `aggregate`."""
        if gramian.ndim < 2 or gramian.shape[-1] != gramian.shape[-2] or gramian.shape[-1] == 0:
            raise ValueError(f"gramian: got shape {tuple(gramian.shape)}, need [..., tasks, tasks] with tasks >= 1")
        if gramian.is_complex():
            raise ValueError(f"gramian: got dtype {gramian.dtype}, need a real dtype")
        name, tasks = type(self).__name__, gramian.shape[:-1]
        if self.needs == "losses" if losses is None else losses.shape != tasks:
            shape = None if losses is None else tuple(losses.shape)
            raise ValueError(f"losses: got {shape}, {name} needs one per task")
        if self.needs == "jacobian" and (jacobian is None or jacobian.shape[:-1] != tasks or not jacobian.numel()):
            shape = None if jacobian is None else tuple(jacobian.shape)
            raise ValueError(f"jacobian: got {shape}, {name} needs [tasks, parameters] and one Gramian")

    @torch.no_grad()
    def aggregate(
        self,
        gramian: Float[Tensor, "*batch tasks tasks"],
        noise: Tensor | None = None,
        losses: Float[Tensor, "*batch tasks"] | None = None,
        jacobian: Float[Tensor, "tasks parameters"] | None = None,
        state: Mapping[str, Tensor] | None = None,
        rounding: float | None = None,
    ) -> Aggregation:
        """Weights for one Gramian or a batch of them; a pure function, which raises for wrong shapes alone.

        The Gramian is copied to float64, symmetrised and divided by its mean diagonal, so no tolerance depends on the
        scale of the gradients. Tasks without gradient get weight 0; an all-zero Gramian gives weights 0; a Gramian
        with a NaN or infinity gives weights and diagnostics NaN for that batch element.

        Args:
            gramian: any real dtype, any device with float64.
            noise: from `draw_noise`.
            losses: the tasks' losses.
            jacobian: J, where the rule needs it.
            state: from the last call's `Aggregation.state`; None means `initial_state`.
            rounding: how well M is known, see `Given.rounding`; None takes it from M's dtype, so a float64 M is then
                taken to be exact to float64.

        Raises:
            ValueError: the last two dimensions are not equal and positive, the dtype is complex, there is not one loss
                per task, or something that the rule needs is missing.
        """
        self.check_shapes(gramian, losses, jacobian)
        if state is None:
            parameters = 0 if jacobian is None else jacobian.shape[-1]
            initial = self.initial_state(tuple(gramian.shape[:-1]), parameters)
            state = {key: value.to(gramian.device) for key, value in initial.items()}

        # Few small operations: on a CPU each costs as much as a whole pass over M.
        matrix = gramian.to(torch.float64)
        matrix = (matrix + matrix.mT) * 0.5
        outside = torch.linalg.vector_norm(matrix, torch.inf, dim=(-2, -1)) * 0.0  # NaN where M is not finite, else 0
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        scale = diagonal.mean(-1)
        sized = scale > outside
        divisor = torch.where(sized, scale, 1.0)
        column = divisor.unsqueeze(-1)
        active = (diagonal > ZERO_NORM**2 * column) & sized.unsqueeze(-1)
        usable = active.any(-1)
        idle = ~usable.unsqueeze(-1)
        pairs = active.unsqueeze(-1) & active.unsqueeze(-2)
        matrix = torch.where(pairs, matrix / column.unsqueeze(-1), 0.0)
        # Where no task has a gradient the rule sees an identity matrix, so that it need not think of the case.
        matrix.diagonal(dim1=-2, dim2=-1).add_(idle)

        given = Given(
            matrix,
            active | idle,
            divisor,
            noise,
            None if losses is None else losses.detach().to(torch.float64),
            None if jacobian is None else jacobian.detach(),
            dict(state),
            rounding_error(gramian.dtype) if rounding is None else rounding,
        )
        result = self.solve(given)

        weights, own, direction = result.weights, result.own_weights, result.direction
        weights = torch.where(active, weights, outside.unsqueeze(-1))
        if self.critic_only and given.losses is not None:
            usable_loss = (given.losses >= 0) & (given.losses < torch.inf)
            weights = torch.where(usable_loss, weights, torch.nan)  # the caller sees whose loss it was
        # A task without a gradient of the shared parameters may have one of its own.
        if own is not None:
            own = torch.where(outside.unsqueeze(-1).isnan(), torch.nan, own)
        if direction is not None:
            direction = torch.where(outside.isnan(), torch.nan, direction)
        return Aggregation(
            weights,
            {key: torch.where(usable, value, outside) for key, value in result.diagnostics.items()},
            {**state, **result.state},
            own,
            direction,
        )

    def __call__(
        self,
        gramian: Float[Tensor, "*batch tasks tasks"],
        noise: Tensor | None = None,
        losses: Float[Tensor, "*batch tasks"] | None = None,
        jacobian: Float[Tensor, "tasks parameters"] | None = None,
    ) -> Aggregation:
        """`aggregate` for interactive use: the object keeps the rule's state, random numbers that are not given come
        from torch's default generator, and a loss that the rule cannot take is told.

        Raises:
            ValueError: see `aggregate`; the state is that of other shapes; or a loss is negative, for a rule with
                `critic_only`.
        """
        self.check_shapes(gramian, losses, jacobian)
        parameters = 0 if jacobian is None else jacobian.shape[-1]
        if noise is None:
            noise = self.draw_noise(gramian.shape[-1], parameters=parameters)
            noise = None if noise is None else noise.to(gramian.device)
        if self.critic_only and losses is not None and bool((losses < 0).any()):
            worst = int(losses.reshape(-1, losses.shape[-1]).amin(0).argmin())
            raise ValueError(
                f"losses: {type(self).__name__} needs losses >= 0, that of task {worst} is {float(losses.min()):.6g}"
            )
        state = vars(self).get("_state")
        if state is not None:
            with torch.device("meta"):  # for the shapes alone: J's may be large
                initial = self.initial_state(tuple(gramian.shape[:-1]), parameters)
            shapes, needed = ({key: tuple(value.shape) for key, value in each.items()} for each in (state, initial))
            if shapes != needed:
                raise ValueError(f"state: got {shapes}, need {needed}; `reset` forgets the earlier calls")
            state = {key: value.to(gramian.device) for key, value in state.items()}
        result = self.aggregate(gramian, noise, losses, jacobian, state)
        if result.state and all(bool(x.isfinite().all()) for x in (result.weights, *result.state.values())):
            object.__setattr__(self, "_state", result.state)  # the object is frozen as to its hyper-parameters
        return result

    def state_dict(self) -> State:
        """What calls of this object have left, as copies; empty before the first one and for rules without state."""
        return {name: value.clone() for name, value in vars(self).get("_state", {}).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where the object went that `state_dict` was called on, bit for bit. The next call checks the shapes.

        Raises:
            ValueError: the names are not those of this rule's state.
        """
        expected = set(self.initial_state((1,), 1))
        if state and set(state) != expected:
            raise ValueError(f"state: got {sorted(state)}, {type(self).__name__} has {sorted(expected)}")
        self.reset()
        if state:
            object.__setattr__(self, "_state", {name: value.clone() for name, value in state.items()})

    def reset(self) -> None:
        """Forget the state."""
        vars(self).pop("_state", None)


def device_of(generator: torch.Generator | None) -> torch.device | None:
    """Where a generator draws; None for torch's default."""
    return None if generator is None else generator.device


def rounding_error(dtype: torch.dtype) -> float:
    """The relative error of inner products that come in this dtype; integers are exact but for what becomes of them."""
    if dtype == torch.float64 or not dtype.is_floating_point:
        return torch.finfo(torch.float64).eps
    return max(torch.finfo(dtype).eps, FLOAT32_SUMS * torch.finfo(torch.float32).eps)


def check_choice(name: str, given: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError naming the field, what was given and what is allowed."""
    if given not in allowed:
        raise ValueError(f"{name}: got {given!r}, allowed: {', '.join(map(repr, allowed))}")


def check_range(name: str, given: float, low: float, high: float) -> None:
    """Raises ValueError unless low <= given <= high (NaN is refused)."""
    if not low <= given <= high:
        raise ValueError(f"{name}: got {given}, allowed: {low} to {high}")
