"""Log Gramians of the per-task gradients of a short MT10 training, and say how they look.

    python scripts/log_gramians.py

writes tests/data/mt10_gramians.npz and the tables of docs/results/mt10_gramians.md. The training is that of
configs/mt10.yaml with a smaller network, a smaller batch and fewer steps, so that it takes minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mtrl_imgrad.aggregators import IMGrad
from mtrl_imgrad.diagnostics import gradient_statistics
from mtrl_imgrad.overlays import parse_config
from mtrl_imgrad.run import Run
from mtrl_imgrad.trainer import run_training

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--config mt10 --aggregator imgrad --seed 1 --device cpu --threads 1 --envs.workers 0 --network.width 128 "
    "--network.depth 2 --sac.warmup 500 --sac.batch-per-task 32 --replay.capacity 50000 --eval.every 0 "
    "--eval.final false --checkpoint.every 0 --checkpoint.replay false --log.every 1000 --log.tensorboard false"
)
STAGES = 6
"""Parts of the training that the table has a line for."""

Recorded = dict[str, list[NDArray[np.float64]]]


def record(run: Run, every: int) -> Recorded:
    """Have the learner's rules keep every n-th Gramian that they are given."""
    recorded: Recorded = {"critic": [], "actor": []}
    for name, rule in run.learner.sac.rules.items():
        own = replace(rule)  # critics and actor share one object
        object.__setattr__(own, "aggregate", keeping(own.aggregate, every, recorded[name]))
        run.learner.sac.rules[name] = own
    return recorded


def keeping(aggregate: Callable, every: int, kept: list[NDArray[np.float64]]) -> Callable:
    """`aggregate`, which keeps what it is given."""
    calls = 0

    def wrapped(gramian: torch.Tensor, *arguments: object) -> object:
        nonlocal calls
        if calls % every == 0:
            kept.append(gramian.detach().double().numpy().copy())
        calls += 1
        return aggregate(gramian, *arguments)

    return wrapped


def statistics(gramians: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What the table shows, of each Gramian."""
    norms = np.sqrt(np.diagonal(gramians, axis1=1, axis2=2))
    eigenvalues = np.linalg.eigvalsh(gramians)
    of_cosines = np.linalg.eigvalsh(gramians / norms[:, :, None] / norms[:, None, :])
    ours = [gradient_statistics(torch.from_numpy(gramian)) for gramian in gramians]
    return {
        "condition number": eigenvalues[:, -1] / eigenvalues[:, 0],
        "of the cosines": of_cosines[:, -1] / of_cosines[:, 0],
        "conflict share": np.array([float(one["conflict_fraction"]) for one in ours]),
        "mean cosine": np.array([float(one["cosine_mean"]) for one in ours]),
        "norm ratio": np.array([float(one["norm_ratio"]) for one in ours]),
        "root mean square norm": np.sqrt((norms**2).mean(1)),
        "cos theta": IMGrad()(torch.from_numpy(gramians)).diagnostics["cos_theta"].numpy(),
    }


def table(steps: NDArray[np.int64], gramians: NDArray[np.float64]) -> str:
    """Medians over each stage of the training, and the least and most of all, in Markdown."""
    shown = statistics(gramians)
    lines = ["| steps per task | " + " | ".join(shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for part in np.array_split(np.arange(len(steps)), STAGES):
        medians = [f"{np.median(values[part]):.3g}" for values in shown.values()]
        lines.append(f"| {steps[part[0]]:,} to {steps[part[-1]]:,} | " + " | ".join(medians) + " |")
    ranges = [f"{values.min():.3g} to {values.max():.3g}" for values in shown.values()]
    return "\n".join([*lines, "| all, least to most | " + " | ".join(ranges) + " |"])


def success(folder: Path) -> float:
    """Mean success rate of the training episodes of the last logging interval that has any."""
    with (folder / "progress.csv").open(newline="") as file:
        rates = [row["rollout/success_rate"] for row in csv.DictReader(file) if row["rollout/success_rate"]]
    return float([rate for rate in rates if rate != "nan"][-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15_000, help="simulator steps per task")
    parser.add_argument("--moments", type=int, default=150, help="moments at which both Gramians are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/data/mt10_gramians.npz")
    parser.add_argument("--note", type=Path, default=ROOT / "docs/results/mt10_gramians.md")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        flags = [*FLAGS.split(), "--sac.steps", str(arguments.steps), "--run-dir", f"{folder}/run"]
        config = parse_config(flags)
        updates = config.sac.steps - config.sac.warmup
        every = max(1, updates // arguments.moments)
        with Run(config) as run:
            recorded = record(run, every)
            run_training(run)
        rate = success(Path(folder) / "run")
    steps = config.sac.warmup + 1 + every * np.arange(len(recorded["critic"]))
    critic, actor = (np.array(recorded[name]) for name in ("critic", "actor"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out, steps=steps, critic=critic, actor=actor)

    parts = [f"Success rate of the last training episodes: {rate:.2f}."]
    parts += [f"## {name.title()}\n\n{table(steps, grams)}" for name, grams in (("critics", critic), ("actor", actor))]
    figures = "\n\n".join(parts) + "\n"
    print(figures)
    marker = "<!-- made by scripts/log_gramians.py -->"
    text = arguments.note.read_text().partition(marker)[0] if arguments.note.exists() else "# Gramians of MT10\n\n"
    arguments.note.parent.mkdir(parents=True, exist_ok=True)
    arguments.note.write_text(f"{text}{marker}\n\n{figures}")


if __name__ == "__main__":
    main()
