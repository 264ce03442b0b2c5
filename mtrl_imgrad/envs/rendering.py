"""Pictures of a task, drawn by MuJoCo in memory: no screen is needed, a graphics library is.

`MUJOCO_GL` chooses the library: `egl` draws on the GPU, `osmesa` on the CPU. Where it is not set, the first one that
works is taken.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled
from jaxtyping import UInt8

LIBRARIES = {"linux": ("egl", "osmesa", "glfw"), "darwin": ("cgl",)}
"""What MuJoCo can draw with, in the order in which they are tried."""
CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
"""Every one of Meta-World's models has these."""
MISSING = (
    "render: no graphics library works here (tried {tried}); on Debian and Ubuntu `apt-get install libosmesa6` gives "
    "one that needs neither GPU nor screen (MUJOCO_GL=osmesa), and a GPU's driver with libegl1 a faster one "
    "(MUJOCO_GL=egl)"
)
SHADOW_PIXELS = 2048
"""Side of the picture from which shadows are drawn. Meta-World's 4096 takes 50 MB more and, where the CPU draws, a
quarter more time; one pixel in a thousand differs."""
PROBE = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16).render()"


@cache
def graphics_library() -> str:
    """The graphics library to draw with, by MuJoCo's name for it.

    Each is tried in a process of its own: one that does not work can spoil a process for the others, or end it.

    Raises:
        DependencyNotInstalled: none works. One line says what to install.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    tried = (wanted,) if wanted else LIBRARIES.get(sys.platform, ("glfw",))
    for name in tried:
        environment = os.environ | {"MUJOCO_GL": name}
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, check=True, timeout=60)
            return name
    raise DependencyNotInstalled(MISSING.format(tried=", ".join(tried)))


class TaskRenderer:
    """Draws one task's simulator, from a copy of its state: drawing changes nothing in it, and what a reset has not
    computed yet, such as where the goal's marker is, is computed.

    Args:
        simulator: gives MuJoCo's model and data of the task as they are now.
        camera: name of one of the model's cameras.
        width: of the pictures, in pixels.
        height: of the pictures, in pixels.

    Raises:
        ValueError: the model has no such camera.
        DependencyNotInstalled: there is no graphics library.
    """

    def __init__(self, simulator: Callable[[], tuple[Any, Any]], camera: str, width: int, height: int) -> None:
        # MuJoCo's names have no types.
        mujoco: Any = importlib.import_module("mujoco")
        self._mujoco, self._simulator = mujoco, simulator
        model, _ = simulator()
        cameras = [model.camera(index).name for index in range(model.ncam)]
        if camera not in cameras:
            raise ValueError(f"camera: {camera!r} is not one of {', '.join(cameras)}")
        self._graphics = importlib.import_module(f"mujoco.{graphics_library()}").GLContext(width, height)
        self._graphics.make_current()
        # The size of the buffer that pictures are drawn into is read from the model, and is nothing but that.
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        model.vis.quality.shadowsize = SHADOW_PIXELS
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        # Python's end comes for the library's memory too late. Of what is registered here, the last is called first, so
        # this is before the library itself is ended.
        atexit.register(self.close)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=2_000)
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
        self._camera.fixedcamid = cameras.index(camera)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._copy = mujoco.MjData(model)
        self._state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION.value))

    def draw(self) -> UInt8[np.ndarray, "height width rgb=3"]:
        """A picture of the simulator's state, its upper row first."""
        mujoco, (model, data) = self._mujoco, self._simulator()
        whole = mujoco.mjtState.mjSTATE_INTEGRATION.value
        mujoco.mj_getState(model, data, self._state, whole)
        mujoco.mj_setState(model, self._copy, self._state, whole)
        mujoco.mj_forward(model, self._copy)
        picture = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        self._graphics.make_current()
        mujoco.mjv_updateScene(
            model, self._copy, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(picture, None, self._viewport, self._context)
        # OpenGL's first row is the lowest. Some of Meta-World's cameras hang upside down: turn their pictures round.
        up = self._copy.cam_xmat[self._camera.fixedcamid][7]
        return np.ascontiguousarray(picture[:, ::-1] if up < -1e-6 else picture[::-1])

    def close(self) -> None:
        """Release the graphics library's memory."""
        atexit.unregister(self.close)
        self._graphics.make_current()
        self._context.free()
        self._graphics.free()
