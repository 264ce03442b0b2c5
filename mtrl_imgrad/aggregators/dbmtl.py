"""DB-MTL: gradients of the losses' logarithms, averaged over time and brought to one norm (Lin et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mtrl_imgrad.aggregators.base import ZERO_NORM, Aggregation, Aggregator, Given, Needs, State, check_range

EPSILON = 1e-8
"""Added to every loss, as in LibMTL's code."""


@dataclass(frozen=True)
class DBMTL(Aggregator):
    """h_i = grad log L_i = g_i / L_i; y_i <- h_i + beta_t (y_i - h_i); d = (1/K) sum_i (max_j ||y_j|| / ||y_i||) y_i.

    beta_t = beta / t^sigma in call t, y starts at 0 and there is no bias correction, so the first directions are short.
    1e-8 is added to every loss.

    Differences: LibMTL's code, by the authors, sums over the tasks; this is the mean. It adds 1e-8 to the norms; here a
    row of no length is left out. Each task's own parameters get the gradient of its log L_i, over K, as there.

    The defaults beta = 0.9, sigma = 0 are LibMTL's; values for RL are unknown. A logarithm needs a positive loss:
    critics only. State: y [K, P], t. Needs J and losses; cost O(K P). The logged weight is the factor on the present
    g_i if beta were 0.

    Identities: all scaled rows have the same norm; a factor on a task's loss, and so on its gradient, changes nothing
    (the 1e-8 aside); with beta = 0, K identical gradients g with one loss L give g / L.
    """

    needs: ClassVar[Needs] = "jacobian"
    paper: ClassVar[str] = "Lin et al. 2023, arXiv 2308.12029"
    critic_only: ClassVar[bool] = True

    beta: float = 0.9
    """Share of the old average in the new one, in the first call (0 to 1); 0 averages nothing."""

    sigma: float = 0.0
    """Exponent with which that share falls over the calls."""

    def __post_init__(self) -> None:
        check_range("DBMTL.beta", self.beta, 0.0, 1.0)
        check_range("DBMTL.sigma", self.sigma, 0.0, 10.0)

    def initial_state(self, shape: tuple[int, ...], parameters: int) -> State:
        return {"average": torch.zeros(*shape, parameters), "calls": torch.zeros((), dtype=torch.float64)}

    def solve(self, given: Given) -> Aggregation:
        jacobian, losses, calls = given.jacobian, given.losses, given.state["calls"] + 1
        assert jacobian is not None
        if losses is None:
            raise ValueError("losses: got None, DBMTL needs one per task besides the Jacobian")
        inverse = 1 / (losses + EPSILON)
        rows = jacobian * inverse.to(jacobian.dtype)[:, None]
        share = (self.beta / calls**self.sigma).to(rows.dtype)
        average = rows + share * (given.state["average"].to(rows.dtype) - rows)
        norms = average.norm(dim=-1).double()
        longest = norms.amax()
        present = norms > ZERO_NORM * longest
        factors = torch.where(present, longest / torch.where(present, norms, 1.0), 0.0) / len(rows)
        return Aggregation(
            factors * inverse,
            state={"average": average, "calls": calls},
            own_weights=inverse / len(rows),
            direction=factors.to(rows.dtype) @ average,
        )
