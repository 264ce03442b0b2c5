"""The small problems behind the rules, one page each. All are batched over leading dimensions, float64, of a fixed
number of steps, and wait for no device.

* `simplex`: min over the simplex of p.w + r sqrt(w'Mw) + (q/2) w'Mw (CAGrad, IMGrad, ConicGrad, SDMGrad, MGDA); its
  second route for CPU tensors is `active_set`.
* `dual_cone`: min over v >= u of v'Mv, the projection onto the dual cone (UPGrad, DualProj).
* `alpha_fair`: M w = w^(-1/alpha) (Nash-MTL, FairGrad).
* `eigen`: eigen-decomposition (Aligned-MTL). `correlations`: the Gramian of the gradients at unit length.
* `pairwise`: every task meets the others in a random order (PCGrad, GradVac).
* `projection`: the nearest point of the simplex (MoCo).
"""

from mtrl_imgrad.aggregators.solvers.projection import project_onto_simplex
from mtrl_imgrad.aggregators.solvers.simplex import ROUTES, Route, SimplexSolution, minimise_on_simplex, takes_host

__all__ = ["ROUTES", "Route", "SimplexSolution", "minimise_on_simplex", "project_onto_simplex", "takes_host"]
