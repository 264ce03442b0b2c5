"""Runs on a Ray cluster. Ray decides when and where: each run is an actor that trains in a scratch folder of its
machine. The run folder is copied from there while it grows, so that no shared file system is needed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtrl_imgrad.comparison.gathering import Changes, Stamps, apply, changes
from mtrl_imgrad.comparison.plan import PlannedRun
from mtrl_imgrad.comparison.processes import MTRL_IMGRAD, PATIENCE, LocalRun, why_failed
from mtrl_imgrad.files import FolderLock
from mtrl_imgrad.overlays import merged_overlays
from mtrl_imgrad.parsing import UserError

ATTEMPTS = 3
"""How often a run is started when the machine that trains it is lost."""


OVERLAY = "overlay.yaml"
"""All overlays of the command line as one, since the files that they came from lie on another machine."""
COPY_EVERY = 5.0
"""Seconds between two copies of a run folder."""
WANTED = ("CPU", "GPU")
"""Ray's names of what a run needs."""


class RemoteRun:
    """The actor: one run on the machine where Ray puts it.

    Args:
        command: program and arguments, run in the folder above the run folder.
        name: of the run folder.
        before: what an earlier attempt left.
        overlay: content of `OVERLAY`, which the arguments name.
    """

    def __init__(self, command: Sequence[str], name: str, before: Changes, overlay: str) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        Path(self.scratch.name, OVERLAY).write_text(overlay)
        self.folder, self.known = Path(self.scratch.name, name), Stamps()
        if before.files:
            apply(before, self.folder)
            _, self.known = changes(self.folder, self.known)
        self.run = LocalRun(command, Path(self.scratch.name, "log"), Path(self.scratch.name))

    def look(self) -> tuple[int | None, Changes, str]:
        """The exit code once the run has ended, what is new in its folder, and what it has printed."""
        code = self.run.process.poll()
        new, self.known = changes(self.folder, self.known)
        return code, new, self.run.log.read_text(errors="replace")

    def end(self) -> None:
        """Stop the run."""
        self.run.terminate()
        self.run.wait()


class RayRun:
    """A run of this comparison on the cluster.

    Args:
        ray: the module.
        actor: makes a `RemoteRun` on the cluster.
        run: which run.
        program: what takes the command line of a run.
        divided: flags with the run's share of its machine.
        log: file that takes what the run prints.
    """

    def __init__(
        self, ray: Any, actor: Any, run: PlannedRun, program: Sequence[str], divided: Sequence[str], log: Path
    ) -> None:
        self.ray, self.actor, self.run, self.log = ray, actor, run, log
        self.program, self.divided = program, divided
        run.folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(run.folder)
        self.attempts = 0
        self._start()

    def _start(self) -> None:
        self.attempts += 1
        self.begun = False
        before, _ = changes(self.run.folder, {})
        overlay, flags = merged_overlays(self.run.flags)
        command = [*self.program, *self.run.command(self.divided, self.run.name, ["--config", OVERLAY, *flags])]
        self.remote = self.actor.remote(command, self.run.name, before, yaml.safe_dump(overlay))
        self.asked, self.copied = self.remote.look.remote(), time.monotonic()

    def failure(self) -> str | None:
        if self.asked is None:
            if time.monotonic() > self.copied + COPY_EVERY:
                self.asked = self.remote.look.remote()
            return None
        if not self.ray.wait([self.asked], timeout=0)[0]:  # it still waits for resources, or is just copied
            return None
        try:
            code, new, printed = self.ray.get(self.asked)
            apply(new, self.run.folder)
            self.log.write_text(printed)
        except self.ray.exceptions.RayActorError as error:
            if self.attempts < ATTEMPTS:
                self._start()
                return None
            return self._end(f"its machine was lost {ATTEMPTS} times: {' '.join(str(error).split())[:200]}")
        except (self.ray.exceptions.RayError, OSError, ValueError) as error:
            return self._end(f"its folder could not be copied: {' '.join(str(error).split())[-200:]}")
        self.begun, self.asked, self.copied = True, None, time.monotonic()
        return None if code is None else self._end(why_failed(code, printed))

    def _end(self, failure: str) -> str:
        self.ray.kill(self.remote)  # on Linux a run that has not ended dies with it
        self.lock.release()
        return failure

    def terminate(self) -> None:
        if self.begun:
            self.asked = self.remote.end.remote()
        else:  # it must not begin when others have made room
            self.ray.kill(self.remote)

    def wait(self) -> None:
        if self.begun:
            self.ray.wait([self.asked], timeout=PATIENCE)
        self._end("")


@contextlib.contextmanager
def on_ray(
    address: str,
    cpus: float,
    gpus: float,
    divided: Sequence[str],
    logs: Path,
    program: Sequence[str] = MTRL_IMGRAD,
) -> Iterator[Callable[[PlannedRun], RayRun]]:
    """What starts a run on a cluster, while the cluster is connected.

    Args:
        address: of the cluster; empty starts one on this machine and ends it.
        cpus: processors of one run.
        gpus: GPUs of one run; a fraction shares one.
        divided: flags that make a run use so many.
        logs: folder of what runs print.
        program: what takes the command line of a run; every machine must have it.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, or no machine has the resources of one run.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            'launcher: ray is not installed; `pip install ".[ray]"` in a clone of mtrl_imgrad does it.'
        ) from None
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host:  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), PATIENCE).close()
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray has no class of its own for a cluster that does not answer
        raise UserError(f"address: {address!r} cannot be reached ({' '.join(str(error).split())[:200]}).") from None
    try:
        largest = {name: max((node["Resources"].get(name, 0) for node in ray.nodes()), default=0) for name in WANTED}
        for name, wanted in zip(WANTED, (cpus, gpus), strict=True):
            if wanted > largest[name]:
                raise UserError(f"{name.lower()}s: a run wants {wanted:g}; no machine has more than {largest[name]:g}.")
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(RemoteRun)

        def start(run: PlannedRun) -> RayRun:
            return RayRun(ray, actor, run, program, divided, logs / f"{run.name}.log")

        yield start
    finally:
        ray.shutdown()
