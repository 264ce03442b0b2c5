"""Runs on a Ray cluster. Ray decides when and where: each run is an actor that trains in a scratch folder of its
machine. The run folder is copied from there while it grows, so that no shared file system is needed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mtrl_imgrad.comparison.gathering import Changes, Stamps, apply, changes
from mtrl_imgrad.comparison.plan import PlannedRun
from mtrl_imgrad.comparison.processes import MTRL_IMGRAD, PATIENCE, LocalRun, why_failed
from mtrl_imgrad.files import FolderLock
from mtrl_imgrad.parsing import UserError

ATTEMPTS = 3
"""How often a run is started when the machine that trains it is lost."""


WANTED = ("CPU", "GPU")
"""Ray's names of what a run needs."""


class RemoteRun:
    """The actor: one run on the machine where Ray puts it.

    Args:
        command: program and arguments, run in the folder above the run folder.
        name: of the run folder.
        before: what an earlier attempt left.
    """

    def __init__(self, command: Sequence[str], name: str, before: Changes) -> None:
        self.scratch = tempfile.TemporaryDirectory()
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
        command: program and arguments that start the run or go on with it, in the folder above the run folder.
        log: file that takes what the run prints.
    """

    def __init__(self, ray: Any, actor: Any, run: PlannedRun, command: Callable[[], Sequence[str]], log: Path) -> None:
        self.ray, self.actor, self.run, self.command, self.log = ray, actor, run, command, log
        run.folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(run.folder)
        self.attempts = 0
        self._start()

    def _start(self) -> None:
        self.attempts += 1
        before, _ = changes(self.run.folder, {})
        self.remote = self.actor.remote(self.command(), self.run.name, before)
        self.asked = self.remote.look.remote()

    def failure(self) -> str | None:
        if not self.ray.wait([self.asked], timeout=0)[0]:  # it still waits for resources, or is just copied
            return None
        try:
            code, new, printed = self.ray.get(self.asked)
        except self.ray.exceptions.RayActorError as error:
            if self.attempts < ATTEMPTS:
                self._start()
                return None
            self.lock.release()
            return f"its machine was lost {ATTEMPTS} times: {' '.join(str(error).split())[:200]}"
        apply(new, self.run.folder)
        self.log.write_text(printed)
        if code is None:
            self.asked = self.remote.look.remote()
            return None
        self.ray.kill(self.remote)
        self.lock.release()
        return why_failed(code, printed)

    def terminate(self) -> None:
        self.asked = self.remote.end.remote()

    def wait(self) -> None:
        self.ray.wait([self.asked], timeout=PATIENCE)
        self.ray.kill(self.remote)  # on Linux a run that has not ended dies with it
        self.lock.release()


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
        raise UserError('launcher: ray is not installed; pip install "mtrl_imgrad[ray]" does it.') from None
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host:  # Ray itself would wait for minutes
            socket.create_connection((host, int(port)), PATIENCE).close()
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"address: {address!r} cannot be reached ({' '.join(str(error).split())[:200]}).") from None
    try:
        largest = {name: max((node["Resources"].get(name, 0) for node in ray.nodes()), default=0) for name in WANTED}
        for name, wanted in zip(WANTED, (cpus, gpus), strict=True):
            if wanted > largest[name]:
                raise UserError(f"{name.lower()}s: a run wants {wanted:g}; no machine has more than {largest[name]:g}.")
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus)(RemoteRun)

        def start(run: PlannedRun) -> RayRun:
            def command() -> list[str]:
                return [*program, *(word.replace(str(run.folder), run.name) for word in run.command(divided))]

            return RayRun(ray, actor, run, command, logs / f"{run.name}.log")

        yield start
    finally:
        ray.shutdown()
