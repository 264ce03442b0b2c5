"""The small problems behind the rules, one page each. All are batched over leading dimensions, float64, of a fixed
number of steps, and wait for no device.

* `simplex`: min over the simplex of p.w + r sqrt(w'Mw) + (q/2) w'Mw (CAGrad, IMGrad, ConicGrad, SDMGrad, MGDA); its
  second route for CPU tensors is `active_set`.
* `pairwise`: every task meets the others in a random order (PCGrad, GradVac).
* `projection`: the nearest point of the simplex (MoCo).
"""

from mtrl_imgrad.aggregators.solvers.projection import project_onto_simplex
from mtrl_imgrad.aggregators.solvers.simplex import ROUTES, Route, SimplexSolution, minimise_on_simplex

__all__ = ["ROUTES", "Route", "SimplexSolution", "minimise_on_simplex", "project_onto_simplex"]
