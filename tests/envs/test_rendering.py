"""Pictures. Those that draw need a graphics library, such as Debian's libosmesa6."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled

from mtrl_imgrad.envs import MetaworldTaskEnv, MetaworldVectorEnv, TaskEnv, make_goals
from mtrl_imgrad.envs.rendering import CAMERAS, TaskRenderer, graphics_library
from mtrl_imgrad.envs.sb3 import MtVecEnv

ROOT = Path(__file__).parents[2]
GOAL_GREEN = 2.0
"""A goal's marker is a green ball: its green is more than this times its red and its blue."""


@pytest.fixture(scope="module")
def goals():
    return make_goals(("push-v3", "drawer-close-v3"), goal_seed=3, num_goals=8)


@pytest.fixture
def make_env(goals):
    envs = []

    def make(tasks=("push-v3",), **arguments):
        arguments = {"render_mode": "rgb_array", "width": 160, "height": 120} | arguments
        envs.append(MetaworldVectorEnv(tasks, goals, seed=0, **arguments))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def random_actions(steps, *rows):
    return np.random.default_rng(0).uniform(-1, 1, (steps, *rows, 4)).astype(np.float32)


def centre_of_green(picture):
    """Mean (row, column) of the goal marker's pixels."""
    red, green, blue = np.moveaxis(picture.astype(float) + 1, -1, 0)
    marked = np.argwhere((green > GOAL_GREEN * red) & (green > GOAL_GREEN * blue))
    assert len(marked), "no marker to be seen"
    return marked.mean(0)


@pytest.mark.usefixtures("needs_graphics")
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_is_drawn_and_moves(make_env, workers):
    env = make_env(("push-v3", "drawer-close-v3"), workers=workers)
    env.reset()
    first = env.render()
    for picture in first:
        assert picture.shape == (120, 160, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 20, "a picture of nothing"
    assert (first[0] != first[1]).any()
    for action in random_actions(5, 2):
        env.step(action)
    for before, after in zip(first, env.render(), strict=True):
        assert 0 < (before != after).any(-1).mean() < 0.5, "the arm moves, the table does not"


@pytest.mark.usefixtures("needs_graphics")
def test_cameras_differ(goals):
    env = TaskEnv("push-v3", goals.metaworld_tasks("push-v3"), horizon=5, reward="v2", action_repeat=1)
    env.reset(2)
    renderers = [TaskRenderer(env.simulator, camera, 80, 80) for camera in CAMERAS]
    pictures = [renderer.draw() for renderer in renderers]
    for renderer in renderers:
        renderer.close()
    env.close()
    differing = [(one != other).mean() for i, one in enumerate(pictures) for other in pictures[:i]]
    assert min(differing) > 0.3


@pytest.mark.usefixtures("needs_graphics")
@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_up_is_up(make_env, camera):
    """The world is turned upright: push's goal lies on the table, and the hand, further up, is drawn further up."""
    env = make_env(camera=camera, width=320, height=320)
    env.reset(options={"goals": np.array([[2]])})
    lower = env.render_row(0)
    for _ in range(15):
        env.step(np.array([[0, 0, 1, 0]], np.float32))
    raised = env.render_row(0)
    changed = np.argwhere((lower != raised).any(-1))[:, 0]
    assert changed.mean() < centre_of_green(lower)[0]


@pytest.mark.usefixtures("needs_graphics")
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_every_rows_marker_is_where_its_goal_is_from_the_first_picture_on(make_env, goals, fast):
    """From above, x points right and y up. Rows of one task have different goals; they may share a model."""
    env = make_env(camera="topview", width=400, height=400, envs_per_task=8, fast=fast)
    env.reset(options={"goals": np.arange(8)[:, None]})
    at_start = np.array([centre_of_green(picture) for picture in env.render()])
    env.step(np.zeros((8, 4), np.float32))
    np.testing.assert_allclose([centre_of_green(picture) for picture in env.render()], at_start, atol=1.0)
    seen, is_at = np.stack([at_start[:, 1], -at_start[:, 0]]), goals.vectors["push-v3"][:, 3:5].T
    for axis in range(2):
        assert np.corrcoef(seen[axis], is_at[axis])[0, 1] > 0.99


@pytest.mark.usefixtures("needs_graphics")
def test_drawing_changes_no_number(make_env):
    drawn, plain = make_env(horizon=6), make_env(horizon=6, render_mode=None)
    drawn.reset()
    plain.reset()
    for action in random_actions(14, 1):
        drawn.render()
        for left, right in zip(drawn.step(action)[:4], plain.step(action)[:4], strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.usefixtures("needs_graphics")
def test_single_tasks_and_sb3_draw_too(make_env):
    env = MetaworldTaskEnv("push-v3", num_goals=1, render_mode="rgb_array", width=160, height=120)
    env.reset()
    picture = env.render()
    assert picture is not None
    assert picture.shape == (120, 160, 3)
    env.close()
    ours = MtVecEnv(make_env(("push-v3", "drawer-close-v3")))
    assert ours.render_mode == "rgb_array"
    ours.reset()
    tiled = ours.render()
    assert tiled is not None
    assert tiled.shape == (240, 160, 3)
    np.testing.assert_array_equal(ours.env_method("render", indices=0)[0], tiled[:120])


@pytest.mark.usefixtures("needs_graphics")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unknown_camera_is_named_with_those_there_are(make_env, workers):
    env = make_env(camera="front", workers=workers)
    env.reset()
    with pytest.raises(ValueError, match="camera: 'front' is not one of topview, corner, "):
        env.render()


@pytest.mark.usefixtures("needs_graphics")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_env_that_is_not_closed_says_nothing_when_python_ends(workers):
    program = f"""
from mtrl_imgrad.envs import make_vector_env
envs = make_vector_env("reach-v3", num_goals=1, render_mode="rgb_array", workers={workers})
envs.reset()
print(envs.render_row(0).shape)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(480, 480, 3)\n", "")


def test_rendering_has_to_be_asked_for(make_env):
    env = make_env(render_mode=None)
    env.reset()
    with pytest.raises(RuntimeError, match="render_mode='rgb_array'"):
        env.render()


def test_a_graphics_library_that_cannot_be_loaded_is_told_in_one_line():
    """MuJoCo itself loads it, when it is imported."""
    environment = os.environ | {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}
    command = [sys.executable, "-m", "mtrl_imgrad", "train", "--config", "quickstart"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("mtrl-imgrad: MUJOCO_GL: MuJoCo cannot load 'osmesa'")
    assert "libosmesa6" in line


def test_without_a_graphics_library_one_line_says_what_to_install(monkeypatch):
    """Every library is hidden from the processes that try them."""
    monkeypatch.setenv("PYOPENGL_PLATFORM", "none")
    monkeypatch.setattr("mtrl_imgrad.envs.rendering.LIBRARIES", {sys.platform: ("egl", "osmesa")})
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    graphics_library.cache_clear()
    with pytest.raises(DependencyNotInstalled) as caught:
        graphics_library()
    graphics_library.cache_clear()
    message = str(caught.value)
    assert "\n" not in message
    assert "tried egl, osmesa" in message
    assert "apt-get install libosmesa6" in message
