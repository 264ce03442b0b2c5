"""What an aggregation rule is, and the one pre-step that every rule shares.

To write a rule, subclass `Aggregator` as a dataclass and implement `solve`:

    @dataclass(frozen=True)
    class InverseNorm(Aggregator):
        \"\"\"Weights proportional to 1 / ||g_i||.\"\"\"

        power: float = 1.0
        \"\"\"Exponent of the norm.\"\"\"

        def solve(self, gramian, active, noise):
            norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
            weights = torch.where(active, norms, 1.0).pow(-self.power) * active
            return Aggregation(weights / weights.sum(-1, keepdim=True))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# A task whose gradient norm is below this fraction of the root mean square norm counts as having no gradient.
ZERO_NORM = 1e-12


@dataclass(frozen=True)
class Aggregation:
    """What a rule returns: row weights of the final direction d = J^T weights, and scalars worth logging."""

    weights: Float[Tensor, "*batch tasks"]
    """float64; the 1/K part, the radius c and any rescaling are included."""

    diagnostics: dict[str, Float[Tensor, "*batch"]] = field(default_factory=dict)
    """Scalars of this call, each of shape [*batch]."""


class Aggregator(ABC):
    """A rule that turns the Gramian M = J J^T of the per-task gradients into row weights.

    Subclasses are dataclasses whose fields are the hyper-parameters (float, int, bool, str or Literal), because the
    command line is built from them. All rules here are stateless and give a direction of degree 1 in the gradients
    (weights of degree 0), on the mean scale: K identical gradients g give g times a constant the rule names.
    """

    @abstractmethod
    def solve(
        self, gramian: Float[Tensor, "*batch tasks tasks"], active: Bool[Tensor, "*batch tasks"], noise: Tensor | None
    ) -> Aggregation:
        """The rule itself. It must not copy device tensors to the host.

        Args:
            gramian: float64, finite, symmetric, mean diagonal 1; rows and columns of inactive tasks are exactly 0.
            active: tasks with a gradient, at least one per Gramian; inactive tasks get weight 0 whatever is returned.
            noise: what `draw_noise` returned, on the Gramian's device.
        """

    def draw_noise(self, num_tasks: int, generator: torch.Generator | None = None) -> Tensor | None:
        """The random numbers of one call, or None. Training draws them before the update and hands them in."""
        return None

    @torch.no_grad()
    def __call__(self, gramian: Float[Tensor, "*batch tasks tasks"], noise: Tensor | None = None) -> Aggregation:
        """Weights for one Gramian or a batch of them.

        The Gramian is copied to float64, symmetrised and divided by its mean diagonal, so no tolerance depends on the
        scale of the gradients. Tasks without gradient get weight 0; an all-zero Gramian gives weights 0; a Gramian
        with a NaN or infinity gives weights and diagnostics NaN for that batch element, without raising or hanging.

        Args:
            gramian: any real dtype, any device with float64.
            noise: from `draw_noise`; a random rule called without it draws from torch's default generator, which is
                for interactive use (training passes it, so that eager and compiled updates see the same numbers).

        Raises:
            ValueError: the last two dimensions are not equal and positive, or the dtype is complex.
        """
        if gramian.ndim < 2 or gramian.shape[-1] != gramian.shape[-2] or gramian.shape[-1] == 0:
            raise ValueError(f"gramian: got shape {tuple(gramian.shape)}, need [..., tasks, tasks] with tasks >= 1")
        if gramian.is_complex():
            raise ValueError(f"gramian: got dtype {gramian.dtype}, need a real dtype")
        num_tasks = gramian.shape[-1]
        if noise is None:
            noise = self.draw_noise(num_tasks)
            noise = None if noise is None else noise.to(gramian.device)

        matrix = gramian.detach().to(torch.float64)
        matrix = (matrix + matrix.mT) / 2
        finite = torch.isfinite(matrix).all(-1).all(-1)
        matrix = torch.where(finite[..., None, None], matrix, 0.0)
        scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
        matrix = matrix / torch.where(scale > 0, scale, 1.0)[..., None, None]
        active = (matrix.diagonal(dim1=-2, dim2=-1) > ZERO_NORM**2) & (scale > 0)[..., None]
        # Where no task has a gradient the rule sees an identity matrix, so that it need not think of the case.
        usable = active.any(-1)
        identity = torch.eye(num_tasks, dtype=torch.float64, device=matrix.device)
        matrix = torch.where(active[..., :, None] & active[..., None, :], matrix, 0.0)
        matrix = torch.where(usable[..., None, None], matrix, identity)

        result = self.solve(matrix, active | ~usable[..., None], noise)

        outside = torch.where(finite, 0.0, torch.nan).to(torch.float64)
        weights = torch.where(active, result.weights, outside[..., None])
        diagnostics = {name: torch.where(usable, value, outside) for name, value in result.diagnostics.items()}
        return Aggregation(weights, diagnostics)


def check_choice(name: str, given: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError naming the field, what was given and what is allowed."""
    if given not in allowed:
        raise ValueError(f"{name}: got {given!r}, allowed: {', '.join(map(repr, allowed))}")


def check_range(name: str, given: float, low: float, high: float) -> None:
    """Raises ValueError unless low <= given <= high (NaN is refused)."""
    if not low <= given <= high:
        raise ValueError(f"{name}: got {given}, allowed: {low} to {high}")
