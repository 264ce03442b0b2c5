"""`mtrl-imgrad` on the tiny world: what the tests of comparisons start in processes.

With the environment variable TINY_PAUSE, each training run waits as many seconds in each of its vector steps.
"""

from __future__ import annotations

import os
import sys
import time

from tiny_world import TinyVectorEnv, make_world

from mtrl_imgrad import cli, trainer

PAUSE = float(os.environ.get("TINY_PAUSE", "0"))
open_run, step_wait = trainer.open_run, TinyVectorEnv.step_wait


def open_tiny(config, resume=None, world=make_world, started=None):
    return open_run(config, resume, world, started)


def step_wait_longer(env):
    time.sleep(PAUSE)
    return step_wait(env)


if __name__ == "__main__":
    trainer.open_run, TinyVectorEnv.step_wait = open_tiny, step_wait_longer
    sys.exit(cli.main())
