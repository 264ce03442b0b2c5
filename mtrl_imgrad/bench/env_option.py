"""One way of stepping Meta-World, in a process of its own: what `bench envs` measures.

`bench envs` starts this file with an option's name, a task set, a seed, an episode length and a number of vector steps.
It answers each line on its input with a line of JSON: `construct` (seconds), `warm` (seconds), then as often as wanted
`run` (seconds, and those of the longest vector step).
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

Step = Callable[[np.ndarray], Any]
"""One vector step with the actions `[rows, 4]`."""


def metaworld_vector(tasks: str, seed: int, horizon: int, strategy: str) -> Step:
    """Meta-World's own vector env: gymnasium's Sync or Async."""
    import gymnasium
    import metaworld  # noqa: F401  (registers the env)

    envs = gymnasium.make_vec(f"Meta-World/{tasks}", vector_strategy=strategy, seed=seed, max_episode_steps=horizon)
    envs.reset()
    return envs.step


def sb3_vector(tasks: str, seed: int, horizon: int, kind: str) -> Step:
    """Meta-World's envs in stable-baselines3's DummyVecEnv or SubprocVecEnv. The latter forks where that is safe: by
    default it starts every process anew, each with its own torch, which takes several times the memory."""
    from metaworld import make_mt_envs
    from metaworld.env_dict import MT10_V3, MT25_V3, MT50_V3
    from stable_baselines3.common import vec_env

    names = {"MT10": MT10_V3, "MT25": MT25_V3, "MT50": MT50_V3}[tasks]
    makers: list[Any] = [
        partial(make_mt_envs, name, seed=seed + index, max_episode_steps=horizon) for index, name in enumerate(names)
    ]
    forked = {"start_method": "fork"} if kind == "SubprocVecEnv" and sys.platform == "linux" else {}
    envs = getattr(vec_env, kind)(makers, **forked)
    envs.reset()
    return envs.step


class Ours:
    """`MetaworldVectorEnv` with so many worker processes."""

    def __init__(self, tasks: str, seed: int, horizon: int, workers: int) -> None:
        from mtrl_imgrad.envs import MetaworldVectorEnv, expand_tasks, make_goals

        names = expand_tasks((tasks,))
        goals = make_goals(names, seed)
        self._envs = MetaworldVectorEnv(names, goals, seed=seed, horizon=horizon, workers=workers)
        self._goals = goals.num_goals
        self._envs.reset()

    def __call__(self, actions: np.ndarray) -> None:
        self._envs.step(actions)

    def warm(self) -> None:
        """Visit every goal once: resets are remembered, and in training a goal comes up again and again."""
        for goal in range(self._goals):
            self._envs.reset(options={"goals": np.full((self._envs.num_envs, 1), goal)})


class Physics:
    """The limit: MuJoCo alone, doing for every task what Meta-World lets it do in one recorded episode - the five
    `mj_step` and the `mj_forward` of each step - and nothing else: no observation, reward, reset or shared memory.

    Each call of `mj_step(..., nstep=5)` and `mj_forward` runs in C without Python's lock. By default, threads take
    whole episodes, the longest first, and wait for each other only at the end of a run, which no vector env can do: its
    caller wants all observations before it gives the next actions. With `in_step`, each thread has its share of the
    tasks and waits after every vector step for the others.
    """

    def __init__(self, tasks: str, seed: int, horizon: int, threads: int, in_step: bool = False) -> None:
        from mtrl_imgrad.envs import expand_tasks, make_goals

        names = expand_tasks((tasks,))
        goals = make_goals(names, seed, num_goals=1)
        actions = np.random.default_rng(seed).uniform(-1, 1, (horizon, len(names), 4)).astype(np.float32)
        episodes = [
            _RecordedEpisode(name, goals.metaworld_tasks(name)[0], actions[:, row]) for row, name in enumerate(names)
        ]
        seconds = {id(episode): episode.timed() for episode in episodes}
        self._episodes = sorted(episodes, key=lambda episode: -seconds[id(episode)])
        self._horizon, self._in_step = horizon, in_step
        self._threads = ThreadPoolExecutor(threads)
        self._dealt: list[list[_RecordedEpisode]] = [[] for _ in range(threads)]
        for episode in self._episodes:
            min(self._dealt, key=lambda share: sum(seconds[id(each)] for each in share)).append(episode)

    def run(self, episodes: int) -> None:
        if not self._in_step:
            # One thread plays an episode as often as asked: two at once would share its MuJoCo data.
            list(self._threads.map(partial(_RecordedEpisode.play, times=episodes), self._episodes))
            return
        (mine, *others), wait = self._dealt, concurrent.futures.wait
        for _ in range(episodes):
            for episode in self._episodes:
                episode.start()
            for step in range(self._horizon):
                theirs = [self._threads.submit(_step_all, share, step) for share in others]
                _step_all(mine, step)
                wait(theirs)


class _RecordedEpisode:
    def __init__(self, name: str, goal: Any, actions: np.ndarray) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        env = ALL_V3_ENVIRONMENTS[name]()
        env.set_task(goal)
        env.reset()
        mujoco: Any = importlib.import_module("mujoco")  # its names have no types
        self._mujoco, self._model, self._data = mujoco, env.model, env.data
        self._whole = mujoco.mjtState.mjSTATE_INTEGRATION.value
        self._start = np.empty(mujoco.mj_stateSize(self._model, self._whole))
        mujoco.mj_getState(self._model, self._data, self._start, self._whole)
        self._controls: list[tuple[np.ndarray, np.ndarray]] = []
        for action in actions:
            env.step(action)
            self._controls.append((self._data.mocap_pos.copy(), self._data.ctrl.copy()))
        self._end = self._data.qpos.copy()
        self._substeps = env.frame_skip

    def timed(self) -> float:
        started = time.perf_counter()
        self.play()
        if not np.array_equal(self._data.qpos, self._end):
            raise RuntimeError("the recorded episode did not come out as it was")
        return time.perf_counter() - started

    def start(self) -> None:
        self._mujoco.mj_setState(self._model, self._data, self._start, self._whole)

    def step(self, step: int) -> None:
        data = self._data
        data.mocap_pos[:], data.ctrl[:] = self._controls[step]
        self._mujoco.mj_step(self._model, data, self._substeps)
        self._mujoco.mj_forward(self._model, data)

    def play(self, times: int = 1) -> None:
        for _ in range(times):
            self.start()
            for step in range(len(self._controls)):
                self.step(step)


def _step_all(episodes: Sequence[_RecordedEpisode], step: int) -> None:
    for episode in episodes:
        episode.step(step)


def empty_ours(tasks: str, seed: int, horizon: int, workers: int) -> Step:
    """`MetaworldVectorEnv` over tasks that cost nothing."""
    from mtrl_imgrad.bench.empty import EmptyRows
    from mtrl_imgrad.envs import Goals, MetaworldVectorEnv, expand_tasks

    names = expand_tasks((tasks,))
    goals = Goals(seed, {name: np.zeros((50, 3)) for name in names})
    envs = MetaworldVectorEnv(names, goals, seed=seed, horizon=horizon, workers=workers, maker=EmptyRows)
    envs.reset()
    return envs.step


def empty_gymnasium(tasks: str, seed: int, horizon: int, kind: str) -> Step:
    """gymnasium's SyncVectorEnv or AsyncVectorEnv over tasks that cost nothing."""
    from gymnasium import vector

    from mtrl_imgrad.bench.empty import EmptyEnv

    makers = [partial(EmptyEnv, horizon)] * int(tasks.removeprefix("MT"))
    envs = getattr(vector, kind)(makers, autoreset_mode=vector.AutoresetMode.SAME_STEP)
    envs.reset(seed=seed)
    return envs.step


OPTIONS: dict[str, Callable[[str, int, int], Any]] = {
    "metaworld sync": partial(metaworld_vector, strategy="sync"),
    "metaworld async": partial(metaworld_vector, strategy="async"),
    "SB3 DummyVecEnv": partial(sb3_vector, kind="DummyVecEnv"),
    "SB3 SubprocVecEnv": partial(sb3_vector, kind="SubprocVecEnv"),
    "ours, 0 workers": partial(Ours, workers=0),
    "ours, 1 worker": partial(Ours, workers=1),
    "ours, 2 workers": partial(Ours, workers=2),
    "physics, 1 thread": partial(Physics, threads=1),
    "physics, 2 threads": partial(Physics, threads=2),
    "physics, 2 in step": partial(Physics, threads=2, in_step=True),
    "empty: gymnasium sync": partial(empty_gymnasium, kind="SyncVectorEnv"),
    "empty: gymnasium async": partial(empty_gymnasium, kind="AsyncVectorEnv"),
    "empty: ours, 0 workers": partial(empty_ours, workers=0),
    "empty: ours, 1 worker": partial(empty_ours, workers=1),
    "empty: ours, 2 workers": partial(empty_ours, workers=2),
}
"""What there is to measure, in the table's order. The empty ones step tasks that cost nothing, and show what the vector
env itself costs."""


def run(option: Any, actions: Sequence[np.ndarray], horizon: int) -> dict[str, float]:
    """Take the vector steps; their time, and that of the longest, which is one with resets."""
    started = previous = time.perf_counter()
    longest = 0.0
    if isinstance(option, Physics):
        option.run(len(actions) // horizon)
        return {"seconds": time.perf_counter() - started}
    for action in actions:
        option(action)
        now = time.perf_counter()
        longest, previous = max(longest, now - previous), now
    return {"seconds": previous - started, "longest": longest}


def main() -> None:
    # Answers have the output for themselves: what a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, tasks = sys.argv[1:3]
    seed, horizon, steps = map(int, sys.argv[3:6])
    rows = int(tasks.removeprefix("MT"))
    actions = list(np.random.default_rng(seed).uniform(-1, 1, (steps, rows, 4)).astype(np.float32))
    option: Any = None
    for line in sys.stdin:
        started = time.perf_counter()
        answer: dict[str, float] = {}
        if line == "construct\n":
            option = OPTIONS[name](tasks, seed, horizon)
        elif line == "warm\n":
            if isinstance(option, Ours):
                option.warm()
        else:
            answer = run(option, actions, horizon)
        print(json.dumps({"seconds": time.perf_counter() - started} | answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
