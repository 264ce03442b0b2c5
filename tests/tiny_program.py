"""`mtrl-imgrad` on the tiny world: what the tests of comparisons start in processes.

With the environment variable TINY_PAUSE, each training run waits as many seconds in each of its vector steps; with
TINY_DISK_PAUSE, in the middle of each small file that it writes, and whenever a checkpoint waits for the disk.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tiny_world import TinyVectorEnv, make_world

from mtrl_imgrad import checkpoint, cli, trainer

PAUSE, DISK_PAUSE = (float(os.environ.get(name, "0")) for name in ("TINY_PAUSE", "TINY_DISK_PAUSE"))
open_run, step_wait, sync = trainer.open_run, TinyVectorEnv.step_wait, checkpoint.sync


def open_tiny(config, resume=None, world=make_world, started=None):
    return open_run(config, resume, world, started)


def step_wait_longer(env):
    time.sleep(PAUSE)
    return step_wait(env)


def write_slowly(path, content):
    with path.open("wb", buffering=0) as file:
        file.write(content[: len(content) // 2])
        time.sleep(DISK_PAUSE)
        file.write(content[len(content) // 2 :])


def sync_longer(path):
    time.sleep(DISK_PAUSE)
    sync(path)


if __name__ == "__main__":
    trainer.open_run, TinyVectorEnv.step_wait = open_tiny, step_wait_longer
    if DISK_PAUSE:
        Path.write_bytes, checkpoint.sync = write_slowly, sync_longer
    sys.exit(cli.main())
