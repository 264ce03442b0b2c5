"""What the per-task gradients look like, from their Gramian M = J J^T alone."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor


def gradient_cosines(gramian: Float64[Tensor, "tasks tasks"]) -> Float64[Tensor, "tasks tasks"]:
    """cos(g_i, g_j) of every two tasks; 0 where a gradient is zero or not finite."""
    norms = gramian.diagonal().sqrt()
    return (gramian / (norms[:, None] * norms)).nan_to_num(0.0)


def gradient_statistics(gramian: Float64[Tensor, "tasks tasks"]) -> dict[str, Tensor]:
    """Scalars on the Gramian's device, without a host synchronisation.

    * `cosine_mean`: mean over task pairs of cos(g_i, g_j); 0 where there is no pair.
    * `conflict_fraction`: share of task pairs with <g_i, g_j> < 0.
    * `norm_ratio`: largest over smallest gradient norm, the imbalance ratio of IMGrad's section 3; infinite where a
      gradient is zero.
    """
    norms = gramian.diagonal().sqrt()
    tasks = gramian.shape[0]
    pairs = max(1, tasks * (tasks - 1))
    cosines = gradient_cosines(gramian)
    off_diagonal = cosines - cosines.diagonal().diag_embed()
    return {
        "cosine_mean": off_diagonal.sum() / pairs,
        "conflict_fraction": (off_diagonal < 0).double().sum() / pairs,
        "norm_ratio": norms.amax() / norms.amin(),
    }
