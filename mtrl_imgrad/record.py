"""`mtrl-imgrad record`: a trained agent's episodes as video files.

The episodes are those of `mtrl-imgrad evaluate` (see `playback`). Tasks are played one after another, so that one
simulator and one graphics context are in memory, however many tasks a video shows.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mtrl_imgrad.files import check_place, make_folder, read_object
from mtrl_imgrad.parsing import parse, told_as_user_errors

if TYPE_CHECKING:
    import numpy as np

    from mtrl_imgrad.evaluation import Episode

EPISODES = 3
"""Episodes in a video where neither their number nor goals are given."""
SECONDS_AT_THE_END = 1
"""Seconds of video for which an episode's last frame stands still."""
LARGEST, GRID_WIDTH, SMALLEST = 480, 1600, 192
"""Pixels: side of a task's square where `size` does not say it. The columns of a grid share GRID_WIDTH."""
SIZES = range(SMALLEST, 2161, 2)
"""Pixels that a side may have. On fewer a caption cannot be read, and H.264 wants even numbers."""


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """Record videos of a run's checkpoint on the goals it was evaluated on. Task, goal, success and return are
    written on every frame. A task is shown until half a second after its success, and its return is always that of the
    whole episode, as `evaluate` gives it. Needs a graphics library, but no screen."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    checkpoint: str = "newest"
    """newest, best (by an evaluation during training), or the step of one that was kept."""
    task: tuple[str, ...] = ("all",)
    """Tasks, one file each; `all` is one file with all of them as tiles."""
    episodes: int | None = None
    """Episodes, one after another, on goals spread evenly over the run's goals; none given means 3, or as many as
    there are."""
    goals: tuple[int, ...] = ()
    """Indices of the goals to play, in this order, instead of a number of episodes."""
    out: Path | None = None
    """Folder for the files, RUN/videos where none is given. A file of the same name is replaced."""
    format: Literal["mp4", "gif", "both"] = "mp4"
    """mp4 is H.264; a gif, for slides and issues, has smaller pictures and at most 10 of them per second."""
    camera: str = "corner4"
    """Meta-World's camera: topview, corner, corner2, corner3, corner4, behindGripper or gripperPOV."""
    size: str | None = None
    """WIDTHxHEIGHT of one task in pixels with its caption, even numbers; none means 480x480, and less in a grid of
    more than three columns."""
    fps: int = 20
    """Frames per second of the video. 80 at speed 1 shows every simulator step."""
    speed: float = 1.0
    """Simulated seconds per second of video: 0.25 is slow motion."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto is cuda where there is one, else cpu."""


@dataclasses.dataclass(frozen=True)
class Video:
    """One video's files.

    Attributes:
        tasks: that it shows.
        files: an mp4, a gif or both.
        seconds: how long it plays.
    """

    tasks: tuple[str, ...]
    files: tuple[Path, ...]
    seconds: float


def command_record(arguments: Sequence[str]) -> None:
    options: RecordOptions = parse(RecordOptions, arguments, "record")

    def tell(episode: Episode) -> None:
        won = f"success at step {episode.steps_to_success}" if episode.success else "no success"
        print(f"{episode.task}, goal {episode.goal}: {won}, return {episode.return_:.1f}", flush=True)

    with told_as_user_errors():
        for video in record(options, tell):
            for path in video.files:
                size = path.stat().st_size / 1e6
                print(f"{path}: {size:.2f} MB, {video.seconds:.1f} s at {options.speed:g} x real time")


def record(options: RecordOptions, tell: Callable[[Episode], None] = lambda episode: None) -> Iterator[Video]:
    """Record what is asked for, and yield each video when its files are whole and in their place.

    Args:
        options: what to record.
        tell: called with each episode when it has been played.

    Raises:
        ValueError: an option is out of range, the folder is no run's or has no checkpoint, or there is no graphics
            library.
        OSError: a file cannot be written, or ffmpeg failed.
    """
    check_options(options)
    from gymnasium.error import DependencyNotInstalled

    from mtrl_imgrad.agent import check_tasks, load
    from mtrl_imgrad.envs import Goals, expand_tasks
    from mtrl_imgrad.envs.rendering import graphics_library
    from mtrl_imgrad.playback import Show, play_task
    from mtrl_imgrad.run import choose_device
    from mtrl_imgrad.video import together

    try:
        graphics_library()
    except DependencyNotInstalled as missing:
        raise ValueError(str(missing).replace("; ", ";\n", 1)) from None
    agent = load(options.run, str(choose_device(options.device)), options.checkpoint)
    check_tasks(agent, expand_tasks(agent.config.benchmark.tasks))
    goals = Goals.from_dict(read_object(options.run / "goals.json"))
    indices = chosen_goals(options, goals.num_goals)
    groups = {name: agent.tasks if name == "all" else (name,) for name in options.task}
    for task in itertools.chain(*groups.values()):
        agent.policy(task)  # an unknown name is told before anything is played
        if task not in goals.tasks:
            raise ValueError(f"goals: the run's goals.json has none for {task}; given are those of {goals.tasks}.")
    out = options.out or options.run / "videos"
    check_place("out", out)
    make_folder("out", out)
    for name, tasks in groups.items():
        width, height = tile_size(options.size, len(tasks))
        show = Show(options.camera, width, height, options.fps, options.speed)
        # Files are made beside their place, so that a failure leaves none, and an earlier one as it was.
        with tempfile.TemporaryDirectory(dir=out, prefix=".recording-") as beside:
            tapes = [play_task(agent, goals, task, indices, show, Path(beside), tell) for task in tasks]
            frames = (together(episode, options.fps * SECONDS_AT_THE_END) for episode in zip(*tapes, strict=True))
            made, seconds = encode(Path(beside), itertools.chain.from_iterable(frames), len(tasks), options)
            files = tuple(out / f"{agent.step:010d}-{name}{path.suffix}" for path in made)
            for path, place in zip(made, files, strict=True):
                os.replace(path, place)
        yield Video(tuple(tasks), files, seconds)


def encode(
    folder: Path, frames: Iterator[np.ndarray], tasks: int, options: RecordOptions
) -> tuple[tuple[Path, ...], float]:
    """Write frames of so many tiles as files of the wanted formats in a folder.

    Returns:
        The files, and how many seconds they play.

    Raises:
        OSError: ffmpeg failed.
    """
    from mtrl_imgrad import video

    mp4, gif = folder / "video.mp4", folder / "video.gif"
    count = video.write_mp4(mp4, frames, options.fps)
    if options.format != "mp4":
        columns = video.columns_of(tasks)
        width = min(tile_size(options.size, tasks)[0], video.GIF_WIDTH if columns == 1 else video.GIF_TILE_WIDTH)
        video.write_gif(gif, mp4, folder / "palette.png", min(options.fps, video.GIF_FPS), columns * width)
    files = {"mp4": (mp4,), "gif": (gif,), "both": (mp4, gif)}
    return files[options.format], count / options.fps


def check_options(options: RecordOptions) -> None:
    """Raise the ValueError of the first option that is not allowed, whatever the run is."""
    from mtrl_imgrad.envs.rendering import CAMERAS

    if not options.task:
        raise ValueError("task: none given; allowed are 'all' and the run's tasks.")
    if options.camera not in CAMERAS:
        near = difflib.get_close_matches(options.camera, CAMERAS, 1, 0.0)[0]
        raise ValueError(
            f"camera: {options.camera!r} is no camera of Meta-World's; the nearest is {near!r}.\n"
            f"Allowed are {', '.join(CAMERAS)}."
        )
    tile_size(options.size, 1)
    for name, value, most in (("fps", options.fps, 240), ("speed", options.speed, 100)):
        if not 0 < value <= most:
            raise ValueError(f"{name}: {value} is not above 0 and at most {most}.")


def chosen_goals(options: RecordOptions, available: int) -> list[int]:
    """Indices of the goals to play.

    Raises:
        ValueError: there are not so many, or both a number and indices are given.
    """
    from mtrl_imgrad.evaluation import goal_subset

    if wrong := [goal for goal in options.goals if not 0 <= goal < available]:
        raise ValueError(f"goals: {wrong[0]} is not between 0 and {available - 1}, the run's goals.")
    if options.goals and options.episodes is not None:
        raise ValueError("episodes: not allowed with goals, which has one episode for each; give one of the two.")
    episodes = min(EPISODES, available) if options.episodes is None else options.episodes
    if not 1 <= episodes <= available:
        raise ValueError(f"episodes: {episodes} is not between 1 and {available}, the number of the run's goals.")
    return list(options.goals) or goal_subset(available, episodes).tolist()


def tile_size(size: str | None, tasks: int) -> tuple[int, int]:
    """Width and height of one task's frame, with its caption, in a grid of so many.

    Raises:
        ValueError: `size` is given and is not WIDTHxHEIGHT.
    """
    from mtrl_imgrad.video import columns_of

    if size is None:
        side = min(LARGEST, max(SMALLEST, GRID_WIDTH // columns_of(tasks)))
        return side, side
    parts = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", size)
    if not parts or any(int(part) not in SIZES for part in parts.groups()):
        raise ValueError(
            f"size: {size!r} is not allowed; it must be WIDTHxHEIGHT, even numbers from {SIZES[0]} to {SIZES[-1]}."
        )
    return int(parts[1]), int(parts[2])
