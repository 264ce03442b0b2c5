"""One task's evaluation episodes, played before a camera.

The episodes are those of `mtrl-imgrad evaluate`: the run's own goals, the evaluation horizon, the deterministic policy.
Drawing changes nothing in a simulator, so the success and the return that a video shows are the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtrl_imgrad.agent import Agent
from mtrl_imgrad.config import Config
from mtrl_imgrad.envs import Goals, MetaworldVectorEnv
from mtrl_imgrad.envs.vector import SIMULATOR_STEPS_PER_SECOND
from mtrl_imgrad.evaluation import Episode
from mtrl_imgrad.faults import Transitions
from mtrl_imgrad.video import Caption, Frame, caption_height, tape_reader, tape_writer, with_caption

SECONDS_AFTER_SUCCESS = 0.5
"""Simulated seconds for which a task is still shown after its success."""


@dataclass(frozen=True)
class Show:
    """How a task is shown.

    Attributes:
        camera: name of one of Meta-World's cameras.
        width: of a frame, in pixels.
        height: of a frame with its caption, in pixels.
        fps: frames per second of video.
        speed: simulated seconds per second of video.
    """

    camera: str
    width: int
    height: int
    fps: int
    speed: float

    def frames_due(self, step: int) -> int:
        """Frames that an episode has had when it is this many simulator steps old. Its first is that of its start."""
        # Rounded, since a product such as 0.1 * 3 must not come out below the whole number that it stands for.
        return 1 + math.floor(round(step * self.fps / (SIMULATOR_STEPS_PER_SECOND * self.speed), 6))


def play_task(
    agent: Agent,
    goals: Goals,
    task: str,
    indices: Sequence[int],
    show: Show,
    folder: Path,
    tell: Callable[[Episode], None],
) -> list[Iterator[Frame]]:
    """Play a task's episodes onto tapes in a folder.

    Args:
        agent: plays.
        goals: the goals of the agent's run.
        task: its name.
        indices: the goals to play, an episode each.
        show: how it is shown.
        folder: where the tapes go; they are read when the frames are taken.
        tell: called with each episode when it has been played.

    Returns:
        The frames of each episode.
    """
    env = make_env(agent.config, goals, task, show)
    try:
        for number, goal in enumerate(indices):
            with tape_writer(folder / f"{task}-{number}") as add:
                tell(play(env, agent, task, goal, number, show, lambda *frame, add=add: add(with_caption(*frame))))
    finally:
        env.close()
    return [tape_reader(folder / f"{task}-{number}", show.height, show.width) for number in range(len(indices))]


def make_env(config: Config, goals: Goals, task: str, show: Show) -> MetaworldVectorEnv:
    """The evaluation environment of one task, in this process, with a camera."""
    return MetaworldVectorEnv(
        (task,),
        goals,
        seed=0,
        horizon=config.eval.horizon,
        reward=config.benchmark.reward,
        action_repeat=config.envs.action_repeat,
        fast=config.envs.fast,
        self_check=config.envs.self_check == "on",
        workers=0,
        render_mode="rgb_array",
        camera=show.camera,
        width=show.width,
        height=show.height - caption_height(show.width),
    )


def play(
    env: MetaworldVectorEnv,
    agent: Agent,
    task: str,
    goal: int,
    number: int,
    show: Show,
    add: Callable[[Frame, Caption], None],
) -> Episode:
    """Play one episode to its horizon, or to where a number is not finite or the simulation becomes unstable.

    A task is drawn until SECONDS_AFTER_SUCCESS; what follows is played unseen, for the return of the whole episode. The
    last frame repeats the last picture with the result. The state at the horizon itself is never drawn: the
    environment has then begun its next episode.

    Args:
        env: of one row and this task, with a camera.
        agent: plays.
        task: its name.
        goal: index of the goal.
        number: of the episode, from 0.
        show: how it is shown.
        add: called with each frame's picture and caption.
    """
    horizon, repeat = agent.config.eval.horizon, agent.config.envs.action_repeat
    policy = agent.policy(task)
    observations, _ = env.reset(options={"goals": np.array([[goal]])})
    last_drawn, total, success_step = horizon - 1, 0.0, -1
    picture, drawn_at, frames = env.render_row(0), 0, 1
    add(picture, Caption(task, goal, 0, horizon, -1, 0.0, final=False))
    for decision in range(-(-horizon // repeat)):
        actions, _ = policy.predict(observations[:1], deterministic=True)
        observations, rewards, _, _, infos = env.step(actions)
        if Transitions((task,), actions, rewards, infos["final_obs"], infos).broken()[0]:
            success_step = -1  # as in an evaluation
            break
        step = min((decision + 1) * repeat, horizon)
        total += float(rewards[0])
        if success_step < 0 and infos["success"][0]:
            success_step = step
            last_drawn = min(last_drawn, step + round(SECONDS_AFTER_SUCCESS * SIMULATOR_STEPS_PER_SECOND))
        due = show.frames_due(step)
        if step <= last_drawn and due > frames:
            picture, drawn_at = env.render_row(0), step
            for _ in range(due - frames):
                add(picture, Caption(task, goal, step, horizon, success_step, total, final=False))
            frames = due
    add(picture, Caption(task, goal, drawn_at, horizon, success_step, total, final=True))
    return Episode(agent.step, task, goal, number, int(success_step >= 0), total, success_step)
