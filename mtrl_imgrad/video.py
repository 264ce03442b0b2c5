"""From pictures of tasks to video files: captions, tiles, and ffmpeg at work on a stream of frames.

No more than a few frames are in memory. The tiles of one video are made one task after another, so each waits on a
tape, a compressed file of differences between its frames, until it is laid beside the others.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Frame: TypeAlias = UInt8[np.ndarray, "height width rgb=3"]

BACKGROUND, SUCCEEDED = (24, 24, 24), (16, 72, 32)
"""Colours behind a caption: a success is seen from afar."""
BRIGHT, DIM, RED = (255, 255, 255), (190, 190, 190), (255, 130, 120)
SMALLEST_FONT = 11
"""Pixels. Below that digits run together."""
MARGIN = 4

GIF_FPS, GIF_WIDTH, GIF_TILE_WIDTH = 10, 360, 240
"""A gif is for a slide or an issue, where megabytes count. It has at most so many frames per second, and is at most so
wide where it shows one task, or so wide for each column of tiles. Captions are legible still."""


@dataclass(frozen=True)
class Caption:
    """What is written above a picture of a task.

    Attributes:
        task: its name.
        goal: index of the goal.
        step: simulator steps of the episode until the picture.
        horizon: the episode's simulator steps.
        success_step: simulator steps until the first success, -1 where there was none so far.
        return_: sum of the rewards, so far or, where `final`, of the whole episode.
        final: whether this is the episode's result.
    """

    task: str
    goal: int
    step: int
    horizon: int
    success_step: int
    return_: float
    final: bool

    @property
    def success(self) -> str:
        if self.success_step >= 0:
            return f"success at step {self.success_step}"
        return "no success" if self.final else "no success yet"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _font_size(width: int) -> int:
    return max(SMALLEST_FONT, width // 26)


def caption_height(width: int) -> int:
    """Pixels that the three lines of a caption take above a picture of this width."""
    return 3 * (_font_size(width) + MARGIN) + MARGIN


def with_caption(picture: Frame, caption: Caption) -> Frame:
    """A picture below its caption: `caption_height` rows are added at the top."""
    width = picture.shape[1]
    band = caption_height(width)
    image = Image.new("RGB", (width, band), SUCCEEDED if caption.success_step >= 0 else BACKGROUND)
    draw, font = ImageDraw.Draw(image), _font(_font_size(width))
    missed = caption.final and caption.success_step < 0
    total = f"{'final ' if caption.final else ''}return {caption.return_:.0f}"
    lines = (
        (caption.task, "", BRIGHT),
        (f"goal {caption.goal}", total, DIM),
        (caption.success, f"step {caption.step}/{caption.horizon}", RED if missed else BRIGHT),
    )
    for number, (left, right, colour) in enumerate(lines):
        y = MARGIN + number * (_font_size(width) + MARGIN)
        draw.text((MARGIN, y), left, colour, font)
        draw.text((width - MARGIN, y), right, BRIGHT, font, anchor="ra")
    return np.concatenate([np.asarray(image), picture])


def columns_of(tiles: int) -> int:
    """Columns of a grid of square tiles that is about as wide as a screen: 3 for 5, 5 for 10, 10 for 50."""
    return min(tiles, math.ceil(math.sqrt(tiles * 16 / 9)))


def in_a_grid(tiles: Sequence[Frame]) -> Frame:
    """Tiles of one size side by side, row by row; places left over are dark."""
    columns = columns_of(len(tiles))
    empty = np.full_like(tiles[0], BACKGROUND[0])
    rows = [[*tiles[i : i + columns]] for i in range(0, len(tiles), columns)]
    rows[-1] += [empty] * (columns - len(rows[-1]))
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def together(streams: Sequence[Iterator[Frame]], hold: int) -> Iterator[Frame]:
    """Frames of several tiles as frames of one grid. A stream that has ended stands still at its last frame; the last
    grid is repeated `hold` times."""
    tiles = [next(stream) for stream in streams]
    while True:
        grid = in_a_grid(tiles)
        yield grid
        following = [next(stream, None) for stream in streams]
        if all(frame is None for frame in following):
            break
        tiles = [old if new is None else new for old, new in zip(tiles, following, strict=True)]
    yield from itertools.repeat(grid, hold)


@contextlib.contextmanager
def tape_writer(path: Path) -> Iterator[Callable[[Frame], None]]:
    """Write frames of one size, one by one, for `tape_reader`."""
    # Most pixels stand still: differences compress ten times as well as pictures, and the fastest level does for them.
    with gzip.open(path, "wb", compresslevel=1) as file:
        previous: Frame | None = None

        def add(frame: Frame) -> None:
            nonlocal previous
            file.write((frame if previous is None else frame - previous).tobytes())
            previous = frame

        yield add


def tape_reader(path: Path, height: int, width: int) -> Iterator[Frame]:
    """The frames that were written, exactly."""
    frame = np.zeros((height, width, 3), np.uint8)
    with gzip.open(path, "rb") as file:
        while data := file.read(frame.size):
            frame = frame + np.frombuffer(data, np.uint8).reshape(frame.shape)
            yield frame


def write_mp4(path: Path, frames: Iterable[Frame], fps: int) -> int:
    """Write an H.264 file that plays in browsers, and return how many frames it has.

    Args:
        path: of the file.
        frames: at least one; of one size, even in both directions (H.264 halves the resolution of colours).
        fps: frames per second.

    Raises:
        OSError: there is no ffmpeg, or it failed.
    """
    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    size = ["-video_size", f"{width}x{height}", "-framerate", str(fps)]
    # Players take an untagged file for BT.601 or BT.709 by its size. It is made in BT.709 and says so.
    tags = ":".join(f"{name}=bt709" for name in ("colorspace", "color_primaries", "color_trc"))
    filters = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,setparams=range=tv:{tags}"]
    codec = ["-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p"]
    # The index goes to the front: a browser plays what it has before it has all.
    container = ["-movflags", "+faststart", "-f", "mp4", str(path)]
    arguments = ["-f", "rawvideo", "-pix_fmt", "rgb24", *size, "-i", "-", *filters, *codec, *container]
    return _ffmpeg(arguments, itertools.chain([first], frames))


def write_gif(path: Path, video: Path, palette: Path, fps: int, width: int) -> None:
    """Write a video as a gif that is repeated for ever, with one palette for all of it.

    Args:
        path: of the gif.
        video: what to read.
        palette: a file, ending in .png, for the 256 colours; it may be deleted afterwards.
        fps: frames per second. A gif counts hundredths of a second: 10 is exact, 15 is not.
        width: of the gif, in pixels.

    Raises:
        OSError: there is no ffmpeg, or it failed.
    """
    smaller = f"fps={fps},scale={width}:-1:flags=lanczos"
    _ffmpeg(["-i", str(video), "-vf", f"{smaller},palettegen=stats_mode=full", str(palette)])
    # A regular pattern stands still where the picture does; other ways of mixing colours flicker, at twice the size.
    mixing = f"{smaller}[small];[small][1:v]paletteuse=dither=bayer:bayer_scale=5:diff_mode=rectangle"
    _ffmpeg(["-i", str(video), "-i", str(palette), "-lavfi", mixing, "-loop", "0", "-f", "gif", str(path)])


def _ffmpeg(arguments: Sequence[str], frames: Iterable[Frame] = ()) -> int:
    """Run ffmpeg with frames as its input, and return how many it took. Its return code is looked at: a full disk is
    noticed at the last byte."""
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise OSError("format: there is no ffmpeg here; `pip install imageio-ffmpeg` brings one.") from None
    command, taken = [program, "-v", "error", "-y", *arguments], 0
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log) as process,
    ):
        assert process.stdin
        try:
            # ffmpeg that has ended closes the pipe. Why it did so is in its log.
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                for frame in frames:
                    pipe.write(frame.tobytes())
                    taken += 1
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code:
            log.seek(0)
            said = log.read().decode(errors="replace").split("\n")
            reason = next((line.strip() for line in reversed(said) if line.strip()), "it says nothing")
            raise OSError(f"format: ffmpeg ended with code {code}: {reason}")
    return taken
