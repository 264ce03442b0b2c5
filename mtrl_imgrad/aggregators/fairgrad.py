"""FairGrad: the alpha-fair direction (Ban and Ji 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mtrl_imgrad.aggregators.base import Aggregation, Aggregator, Given, check_choice, check_range
from mtrl_imgrad.aggregators.nashmtl import NORMS, Norm, at_length_of_mean
from mtrl_imgrad.aggregators.solvers.alpha_fair import ALPHA_RANGE, solve_alpha_fair


@dataclass(frozen=True)
class FairGrad(Aggregator):
    """M w = w^(-1/alpha) with w > 0, d = J^T w: the maximiser of the alpha-fair utility of the <g_i, d> over a ball.

    alpha = 1 is Nash-MTL; as alpha grows the <g_i, d> become equal. w is the minimiser of a strictly convex function,
    found by Newton (`solvers.alpha_fair`) to a residual |(Mw)_i w_i^(1/alpha) - 1| of 1e-9 or less for norm ratios of
    1e4, 1e-7 for 1e6; nearly opposed gradients have that of `NashMTL`.

    Differences: the supervised code minimises the squared residual by scipy, which stops early at small scales; the RL
    code takes 20 steps of clipped SGD and ends at 1e-4 of the right length for gradients of length 1e-3, or at a cosine
    of 0.1 for unequal norms. If 0 lies in the hull of the gradients there is no solution: d = 0, as for MGDA.

    J^T w has degree (1 - alpha) / (1 + alpha) in the gradients: the smaller they are the longer it is for alpha > 1, so
    `norm` offers the length of the mean gradient instead, the default. RL values in the published commands: MT10
    alpha = 2; MT50 alpha = 2 too, in a command that is commented out.

    No state. Cost: 16 Cholesky factorisations and 8 log2(alpha)^2. Diagnostics: `residual`.

    Identities: norm "own": K = 1 gives ||d|| = ||g||^((1 - alpha) / (1 + alpha)) and ||d||^2 = sum_i w_i^(1 - 1/alpha);
    norm "mean": ||d|| = ||g0||, degree 1, and K identical gradients g give g.
    """

    alpha: float = 2.0
    """Degree of fairness (0.5 to 10): 1 is proportional fairness, large values equalise the tasks' progress."""

    norm: Norm = "mean"
    """Length of the direction: that of the mean gradient, or the solution's own."""

    paper: ClassVar[str] = "Ban and Ji 2024, arXiv 2402.15638"

    def __post_init__(self) -> None:
        check_range("FairGrad.alpha", self.alpha, *ALPHA_RANGE)
        check_choice("FairGrad.norm", self.norm, NORMS)

    def solve(self, given: Given) -> Aggregation:
        solution = solve_alpha_fair(given.gramian, given.active, self.alpha, given.rounding)
        if self.norm == "mean":
            weights = at_length_of_mean(given.gramian, solution.weights)
        else:
            weights = solution.weights * given.scale.pow(-self.alpha / (1.0 + self.alpha))[..., None]
        return Aggregation(weights, {"residual": solution.residual})
