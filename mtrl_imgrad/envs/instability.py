"""MuJoCo's word on simulations that become unstable.

Where a position, velocity or acceleration is NaN, infinite or above 1e10, MuJoCo puts the simulation back to the
model's initial state, as if nothing had happened, and counts a warning; a control that is not finite it takes for zero,
and counts that too. (`mj_checkPos`, `mj_checkVel`, `mj_checkAcc` and `mj_fwdActuation` of MuJoCo 3.3.)
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco does not tell its names to type checkers.)
from __future__ import annotations

import sys

import mujoco
import numpy as np
from jaxtyping import Int32

_FIRST, _LAST = (int(getattr(mujoco.mjtWarning, f"mjWARN_{name}")) for name in ("BADQPOS", "BADCTRL"))


def instability_counts(simulation: mujoco.MjData) -> Int32[np.ndarray, "kinds=4"]:
    """The warnings of instability since the counts were last set to zero: a view, which steps change. A blow-up also
    sets them to one rather than adding one, so whoever wants to see the next one has to set them to zero.

    From now on MuJoCo no longer prints such warnings nor writes them to MUJOCO_LOG.TXT in the current folder, unless
    this process has its own handler of them.
    """
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_tell_other_warnings)
    return simulation.warning.number[_FIRST : _LAST + 1]


def _tell_other_warnings(text: str) -> None:
    if "simulation is unstable" not in text:
        print(f"MuJoCo: {text.strip()}", file=sys.stderr)
