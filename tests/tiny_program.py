"""`mtrl-imgrad` on the tiny world: what the tests of comparisons start in processes.

With the environment variable TINY_PAUSE, each training run waits as many seconds after each of its vector steps.
"""

from __future__ import annotations

import os
import sys
import time

from tiny_world import make_world

from mtrl_imgrad import cli, run

PAUSE = float(os.environ.get("TINY_PAUSE", "0"))


class TinyRun(run.Run):
    def __init__(self, config, resume=None, started=None):
        super().__init__(config, resume, make_world, started)

    def due(self, every, step):
        time.sleep(PAUSE / 4)
        return super().due(every, step)


if __name__ == "__main__":
    run.Run = TinyRun
    sys.exit(cli.main())
