"""The loop around stable-baselines3's own: it learns until something is due, one function read from top to bottom."""

from __future__ import annotations

from pathlib import Path

from mtrl_imgrad.baselines.sb3_run import Sb3Run
from mtrl_imgrad.config import Config
from mtrl_imgrad.logs import Stopwatch


def chunk_ends(config: Config, start: int) -> list[int]:
    """The steps at which SB3's loop is interrupted: where a report is due, and where episodes end.

    Episodes begin together at `start` and only the horizon ends them; were it otherwise, checkpoints would wait longer.
    """
    episode = -(-config.envs.horizon // config.envs.action_repeat) * config.vector_step
    steps = config.steps_from(start)
    return [
        step
        for step in steps
        if config.due(config.log.every, step)
        or config.due(config.eval.every, step)
        or (step - start) % episode == 0
        or step == steps[-1]
    ]


def run_sb3_training(run: Sb3Run) -> Path:
    """The loop: SB3 learns until something is due; evaluate, report, save."""
    config = run.config
    run.announce()
    watch = Stopwatch(run.start)
    checkpoint_due = False
    before, ends = run.start, chunk_ends(config, run.start)
    for step in ends:
        run.learn((step - before) // config.vector_step, watch)

        # Evaluate on a few goals
        evaluating = config.due(config.eval.every, step)
        evaluated: dict[str, float] = {}
        if evaluating:
            with watch.measure("evaluation"):
                evaluated = run.evaluator.during_training(run.act, step)

        # Report
        if evaluating or config.due(config.log.every, step) or step == ends[-1]:
            counts = {
                "train/updates": float(run.models[0].updates),
                "rollout/transitions": float(step * len(run.tasks)),
                "time/elapsed": run.elapsed(),
            }
            values = counts | run.episodes.pop(run.tasks) | run.losses() | evaluated
            if evaluating and run.log.tensorboard:
                with watch.measure("evaluation", count=0):
                    run.log.tensorboard.evaluation(step, run.tasks, values, {}, run.parameters())
            run.log.row(step, values | watch.pop(step, len(run.tasks)))

        # Save at the next moment when no episode is under way
        every = config.checkpoint.every
        checkpoint_due |= every > 0 and step // every > before // every
        if checkpoint_due and run.at_episode_start:
            run.save(step)
            checkpoint_due = False
        before = step

    run.log.print(f"last update {run.elapsed() / 60:.2f} minutes after the start; {watch.shares()}")
    run.save(before)
    if config.eval.final:
        tags, text = run.evaluator.final(run.act, before)
        run.output.describe(before, tags)
        run.log.print(text)
    return run.folder
