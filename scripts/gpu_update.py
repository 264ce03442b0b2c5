"""What one whole update costs on a GPU: eager, compiled, and as one CUDA graph.

    python scripts/gpu_update.py --config mt10_laptop --device cuda
    python scripts/gpu_update.py --config mt10_laptop --device cuda --aggregator cagrad --sac.batch-per-task 128

Arguments are those of `mtrl-imgrad train`. Batches are random, on the device; the clock is read when the device has
finished a round of updates. The ways take turns, and the table has the median round of each.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mtrl_imgrad.config import Config
from mtrl_imgrad.envs.tasks import expand_tasks
from mtrl_imgrad.learner import Learner
from mtrl_imgrad.overlays import parse_config
from mtrl_imgrad.replay import Batch

OBSERVATION, ACTION = 39, 4
ROUNDS, UPDATES = 10, 20


def random_batch(tasks: int, rows: int, device: torch.device) -> Batch:
    def draw(*last: int) -> torch.Tensor:
        return torch.randn(tasks, rows, *last, device=device)

    return Batch(draw(OBSERVATION), draw(ACTION).tanh(), draw(), draw(OBSERVATION), torch.full_like(draw(), 0.97))


def updater(config: Config, tasks: int) -> tuple[Callable[[], object], float]:
    """Makes one update of a fresh learner, which was compiled as the configuration says, and the seconds that took."""
    device = torch.device("cuda")
    learner = Learner(config, tasks, OBSERVATION, ACTION, device, torch.Generator().manual_seed(1))
    generator = torch.Generator(device).manual_seed(1)
    batch = random_batch(tasks, config.sac.batch_per_task, device)
    started = time.perf_counter()
    if config.compile and (reason := learner.compile()):
        raise RuntimeError(reason)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return lambda: learner.update(batch, learner.draw_noise(generator, generator)), seconds


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_update: there is no GPU here")
    config = parse_config(sys.argv[1:])
    tasks = len(expand_tasks(config.benchmark.tasks))
    ways = {
        "eager": replace(config, compile=False, cuda_graph=False),
        "compiled": replace(config, compile=True, cuda_graph=False),
        "CUDA graph": replace(config, compile=True, cuda_graph=True),
    }
    updates = {name: updater(way, tasks) for name, way in ways.items()}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, (update, _) in updates.items():
            started = time.perf_counter()
            for _ in range(UPDATES):
                update()
            torch.cuda.synchronize()
            spent[name] += [(time.perf_counter() - started) / UPDATES * 1e3] if turn else []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {tasks} tasks, {config.precision}")
    print(config.aggregator)
    print("| way | ms per update | rounds | s to compile |")
    print("|---|---|---|---|")
    for name, (_, seconds) in updates.items():
        rounds = spent[name]
        print(f"| {name} | {statistics.median(rounds):.2f} | {min(rounds):.2f} to {max(rounds):.2f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
