"""The loop around stable-baselines3's own: it learns until something is due, one function read from top to bottom."""

from __future__ import annotations

from pathlib import Path

from mtrl_imgrad.baselines.sb3_run import Sb3Run
from mtrl_imgrad.config import Config
from mtrl_imgrad.logs import Stopwatch


def chunk_ends(config: Config, start: int) -> list[int]:
    """The steps at which SB3's loop is interrupted: where an evaluation, a report or a checkpoint is due."""
    steps = config.steps_from(start)
    return [
        step
        for step in steps
        if any(config.due(every, step) for every in (config.log.every, config.eval.every, config.checkpoint.every))
        or step == steps[-1]
    ]


def run_sb3_training(run: Sb3Run) -> Path:
    """The loop: SB3 learns until something is due; evaluate, report, save."""
    config = run.config
    run.announce()
    watch = Stopwatch(run.start)
    before, ends = run.start, chunk_ends(config, run.start)
    run.interruption.nothing_to_lose = False
    for step in ends:
        run.learn((step - before) // config.vector_step, watch)

        # Evaluate on a few goals
        evaluating = config.due(config.eval.every, step)
        evaluated: dict[str, float] = {}
        if evaluating:
            with watch.measure("evaluation"):
                evaluated = run.evaluator.during_training(run.act, step)
            run.keep_best(step, evaluated)

        # Report
        if evaluating or config.due(config.log.every, step) or step == ends[-1]:
            counts = {
                "train/updates": float(run.models[0].updates),
                "rollout/non_finite": run.faults.count,
                "rollout/transitions": float(step * len(run.tasks)),
                "time/elapsed": run.elapsed(),
            }
            values = counts | run.episodes.pop(run.tasks) | run.losses() | evaluated
            if evaluating and run.log.tensorboard:
                with watch.measure("evaluation", count=0):
                    run.log.tensorboard.evaluation(step, run.tasks, values, {}, run.parameters())
            run.log.row(step, values | watch.pop(step, len(run.tasks)))
            if told := run.faults.told():
                run.log.print(f"warning: {told}")

        # Save
        if config.due(config.checkpoint.every, step) or run.interruption.number:
            run.save(step, required=bool(run.interruption.number))
            run.interruption.end_if_asked()
        before = step

    run.log.print(f"last update {run.elapsed() / 60:.2f} minutes after the start; {watch.shares()}")
    run.save(before, required=True)
    run.interruption.nothing_to_lose = True
    run.interruption.end_if_asked()
    if config.eval.final:
        tags, text = run.evaluator.final(run.act, before)
        run.output.describe(before, tags)
        run.log.print(text)
    return run.folder
