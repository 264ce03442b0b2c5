"""Reads a video file back. (imageio's own reader of videos leaves pipes open, and warnings are errors here.)"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def decoded(path: Path) -> tuple[np.ndarray, str]:
    """Frames `[frames, height, width, 3]`, and what ffmpeg says about the stream."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    (about,) = re.findall(r"Stream #0:0.*Video: .*", done.stderr.decode().split("Output #0")[0])
    width, height = map(int, re.findall(r"(\d+)x(\d+)", about.split("progressive")[-1])[0])
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3), about
