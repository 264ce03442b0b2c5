"""A Meta-World task without the Python around its physics and reward: the same bits, several times sooner.

Three quarters of a Meta-World step are Python. Of these, `evaluate_state`, `compute_reward` and `reset_model` are the
benchmark, and run as they are. What goes is what surrounds them:

* names of bodies, sites and geoms are looked up once (the memory of `mjData` does not move), not at every use;
* the observation is filled into one array in place of eight small ones that are then stacked;
* contacts are read as one list; Meta-World makes two passes over Python objects, one per contact;
* `mj_rnePostConstraint` computes what nothing reads, and moving target sites is undone by the `mj_forward` after it;
* `norm`, `tolerance` and `Rotation` are stand-ins with the same bits (see `shims`);
* a reset's outcome depends on its goal alone, so it is simulated once per goal and then restored.

`mj_forward` at the end of a step stays: it changes the warm start of the next one.

An env object is made by Meta-World's own class, whose run-time subclass it becomes to step, and which it becomes again
to reset: every reset that is simulated runs Meta-World's code and nothing else.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco does not tell its names to type checkers.)
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
from jaxtyping import Float64

from mtrl_imgrad.envs.shims import shimmed_globals, with_globals

if TYPE_CHECKING:
    from metaworld.types import Task

    from mtrl_imgrad.envs.task_env import RewardVersion

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)


class Named:
    """One body, geom, site or joint of `mjData`, whose arrays are looked up once: their memory does not move."""

    def __init__(self, entry: Any) -> None:
        vars(self)["entry"] = entry

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.entry, name)
        if isinstance(value, np.ndarray):
            vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.entry, name, value)


class NamedViews:
    """`mjData` whose `body(name)`, `geom(name)`, `site(name)` and `joint(name)` are looked up once."""

    def __init__(self, data: mujoco.MjData) -> None:
        self._data = data
        for kind in ("body", "geom", "site", "joint"):
            setattr(self, kind, _looked_up_once(getattr(data, kind)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def _looked_up_once(find: Callable[[str], Any]) -> Callable[[str], Named]:
    return cache(lambda name: Named(find(name)))


class FastStepping:
    """What the subclass of a Meta-World env does in its own way. Each method names the one it replaces or has its name;
    arithmetic, order and types are that one's.
    """

    def become_fast(self: Any) -> None:
        """Look up what stepping needs. Called once, on an env that has a task."""
        data: mujoco.MjData = self.data
        self.simulation = data
        self.views = NamedViews(data)
        bodies = [data.body(name).xpos for name in ("hand", "rightclaw", "leftclaw")]
        self.points = (*bodies, *(data.site(name).xpos for name in ("rightEndEffector", "leftEndEffector")))
        self.pads = tuple(data.geom(name).id for name in ("leftpad_geom", "rightpad_geom"))
        self.tcp_center = None

    def objects(self: Any, entries: Float64[np.ndarray, "entries=14"]) -> None:
        """The objects' part of `_get_curr_obs_combined_no_goal`: position and orientation of one object or two."""
        positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
        entries[:3], entries[3:7] = positions[:3], quaternions[:4]
        if len(positions) == 3:
            entries[7:] = 0.0
        else:
            entries[7:10], entries[10:] = positions[3:], quaternions[4:]

    def get_endeff_pos(self: Any) -> Float64[np.ndarray, "xyz=3"]:
        return self.points[0]

    def get_body_com(self: Any, body_name: str) -> Float64[np.ndarray, "xyz=3"]:
        return self.views.body(body_name).xpos

    def _get_site_pos(self: Any, site_name: str) -> Float64[np.ndarray, "xyz=3"]:
        return self.views.site(site_name).xpos.copy()

    def touching_object(self: Any, object_geom_id: int) -> bool:
        contact = self.simulation.contact
        geoms = contact.geom.ravel().tolist()
        left_pad, right_pad = self.pads
        if not (object_geom_id in geoms and left_pad in geoms and right_pad in geoms):
            return False
        forces, addresses = self.simulation.efc_force, contact.efc_address
        left_force = right_force = 0.0
        for index, pair in enumerate(zip(geoms[::2], geoms[1::2], strict=True)):
            if object_geom_id in pair:
                if left_pad in pair:
                    left_force += forces[addresses[index]]
                if right_pad in pair:
                    right_force += forces[addresses[index]]
        return bool(left_force > 0 and right_force > 0)

    tcp_center = None
    """`tcp_center` is a property of Meta-World's; here it is an attribute, which each step sets."""


@cache
def fast_class(env_class: type) -> type:
    """The subclass of a Meta-World env class that steps fast. Its methods are Meta-World's code objects, with globals
    that hold the stand-ins; constructing and resetting are left alone."""
    untouched = {"__init__", "reset", "reset_model", "step", "set_task"}
    names_of: dict[int, dict[str, Any]] = {}
    methods: dict[str, Any] = {}
    for base in reversed(env_class.__mro__):
        if base.__module__.startswith("metaworld"):
            copies = {name: _copy(member, names_of) for name, member in vars(base).items() if name not in untouched}
            methods |= {name: copy for name, copy in copies.items() if copy is not None}
    # Copied rather than inherited: with two bases, an object could not change from one class to the other.
    methods |= {name: member for name, member in vars(FastStepping).items() if not name.startswith("__")}
    fast = type(f"Fast{env_class.__name__}", (env_class,), methods)
    for names in names_of.values():
        if names.get(env_class.__name__) is env_class:
            names[env_class.__name__] = fast  # for its static methods
    return fast


def _copy(member: Any, names_of: dict[int, dict[str, Any]]) -> Any:
    """A function, static method or property with stand-ins among its globals; None for anything else.

    Args:
        member: of a class.
        names_of: the globals with stand-ins, by the identity of the originals; filled as they are met.
    """
    if isinstance(member, staticmethod):
        return staticmethod(_copy(member.__func__, names_of))
    if isinstance(member, property):
        return property(_copy(member.fget, names_of), member.fset, member.fdel)
    if not isinstance(member, FunctionType):
        return None
    if member.__name__ == "inner" and member.__closure__:
        # The decorator `assert_task_is_set`: the task is set before an env becomes fast.
        return _copy(member.__closure__[0].cell_contents, names_of)
    if id(member.__globals__) not in names_of:
        names_of[id(member.__globals__)] = shimmed_globals(member)
    return with_globals(member, names_of[id(member.__globals__)])


@dataclass(frozen=True)
class EpisodeStart:
    """What a reset to one goal leaves behind.

    Attributes:
        state: MuJoCo's integration state.
        body_positions, site_positions: the parts of the model that tasks move, float64 `[n, 3]` in metres.
        attributes: the env attributes that the reset assigned.
        windows: those of them that look into an array of `mjData`: its name, first entry and shape.
        observation: the first one.
    """

    state: Float64[np.ndarray, " state"]
    body_positions: Float64[np.ndarray, "bodies 3"]
    site_positions: Float64[np.ndarray, "sites 3"]
    attributes: dict[str, Any]
    windows: dict[str, tuple[str, int, tuple[int, ...]]]
    observation: Float64[np.ndarray, "observation=39"]


class FastTask:
    """What the fast envs of one task in one process share: the model, and the episode starts met so far.

    Args:
        task: the task's name.
        goals: its goals as Meta-World's objects.
    """

    def __init__(self, task: str, goals: Sequence[Task]) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.env_class: type = ALL_V3_ENVIRONMENTS[task]
        self._goals = goals
        self._model: mujoco.MjModel | None = None
        self._starts: dict[int, EpisodeStart] = {}
        self.on_model: EpisodeStart | None = None

    def make(self, reward: RewardVersion) -> Any:
        """A fast env. The first one compiles the model, further ones have only their own `mjData`."""
        model = self._model
        env_class = self.env_class
        if model is not None:
            simulation = {"_initialize_simulation": lambda _: (model, mujoco.MjData(model))}
            env_class = type(env_class.__name__, (env_class,), simulation)
        env: Any = env_class(reward_function_version=reward)
        env.set_task(self._goals[0])
        self._model = env.model
        env.__class__ = fast_class(self.env_class)
        env.become_fast()
        env.data = env.views
        return env

    def start(self, env: Any, goal: int) -> EpisodeStart:
        """Put an env at the start of an episode: simulate it the first time, restore it from then on."""
        start = self._starts.get(goal)
        if start is None:
            start = self._starts[goal] = self.on_model = self.simulate_start(env, goal)
            return start
        if self.on_model is not start:
            self.place(start)
        mujoco.mj_setState(env.model, env.simulation, start.state, _STATE)
        attributes = vars(env)
        attributes.update(start.attributes)
        for name, (array, first, shape) in start.windows.items():
            entries = getattr(env.simulation, array).reshape(-1)
            attributes[name] = entries[first : first + math.prod(shape)].reshape(shape)
        return start

    def place(self, start: EpisodeStart) -> None:
        """Move the bodies and sites of the shared model to where the goal of this start has them."""
        if self._model is not None:
            self._model.body_pos[:] = start.body_positions
            self._model.site_pos[:] = start.site_positions
            self.on_model = start

    def become_plain(self, env: Any) -> None:
        """Make it Meta-World's own env, for a reset or a comparison; `become_fast_again` is the way back."""
        env.__class__, env.data = self.env_class, env.simulation

    def become_fast_again(self, env: Any) -> None:
        env.__class__, env.data = fast_class(self.env_class), env.views

    def simulate_start(self, env: Any, goal: int) -> EpisodeStart:
        self.become_plain(env)
        env.__class__ = _recording_class(self.env_class)
        vars(env)["assigned"] = assigned = set()
        env.set_task(self._goals[goal])
        observation, _ = env.reset()
        self.become_fast_again(env)
        attributes = {name: value for name, value in vars(env).items() if name in assigned}
        windows = {name: window for name, value in attributes.items() if (window := _window(env.simulation, value))}
        state = np.empty(mujoco.mj_stateSize(env.model, _STATE))
        mujoco.mj_getState(env.model, env.simulation, state, _STATE)
        model = env.model
        return EpisodeStart(
            state, model.body_pos.copy(), model.site_pos.copy(), attributes, windows, observation.astype(np.float64)
        )


@cache
def _recording_class(env_class: type) -> type:
    """A subclass that notes the names of the attributes that are assigned, in the set `assigned`."""

    def note(self: Any, name: str, value: Any) -> None:
        vars(self)["assigned"].add(name)
        object.__setattr__(self, name, value)

    return type(env_class.__name__, (env_class,), {"__setattr__": note})


def _window(data: mujoco.MjData, value: Any) -> tuple[str, int, tuple[int, ...]] | None:
    """Where in `mjData` an array looks, or None if it is no array or has its own memory."""
    if not isinstance(value, np.ndarray) or value.flags.owndata:
        return None
    for name in dir(data):
        array = getattr(data, name, None)
        if (
            isinstance(array, np.ndarray)
            and array.size
            and array.dtype == value.dtype
            and np.shares_memory(array, value)
        ):
            first = value.__array_interface__["data"][0] - array.__array_interface__["data"][0]
            return name, first // value.itemsize, value.shape
    return None
