"""The training loop, one function read from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtrl_imgrad.averages import by_task
from mtrl_imgrad.baselines.sb3_run import Sb3Run
from mtrl_imgrad.baselines.sb3_training import run_sb3_training
from mtrl_imgrad.config import Config
from mtrl_imgrad.faults import Transitions, require_finite
from mtrl_imgrad.files import refuse_ways_out
from mtrl_imgrad.gradient_cosines import append_rows
from mtrl_imgrad.learner import NonFiniteError
from mtrl_imgrad.logs import Stopwatch
from mtrl_imgrad.run import Run
from mtrl_imgrad.world import MakeWorld, metaworld


def train(config: Config, resume: Path | None = None, make_world: MakeWorld = metaworld) -> Path:
    """Train an agent with `config.algorithm` and return its run folder.

    Args:
        config: what to train.
        resume: a run folder to go on with from its newest checkpoint; None starts a new one.
        make_world: makes the environments; Meta-World by default.

    Raises:
        ValueError: a field is not allowed, or the folder cannot be resumed.
        MemoryError: the replay does not fit.
        FileExistsError: the run folder exists.
        NonFiniteError: a loss or a transition was not finite; see `sac.nan_policy`.
    """
    opened, loop = open_run(config, resume, make_world)
    with opened as run:
        return loop(run)


def open_run(
    config: Config, resume: Path | None = None, make_world: MakeWorld = metaworld, started: float | None = None
) -> tuple[Any, Callable[[Any], Path]]:
    """A run of `config.algorithm`, a context manager that closes it, and the loop that trains in it; arguments and
    errors are those of `Run`."""
    if resume:
        refuse_ways_out(resume)
    make, loop = (Run, run_training) if config.algorithm == "mtsac" else (Sb3Run, run_sb3_training)
    return make(config, resume, make_world, started), loop


def run_training(run: Run) -> Path:
    """The loop: act, store, learn, evaluate, report, save."""
    config = run.config
    run.announce()
    run.compile_update()
    sac, learner, replay, random = config.sac, run.learner, run.replay, run.generators
    watch = Stopwatch(run.start)
    steps = config.steps_from(run.start)
    run.interruption.nothing_to_lose = False
    for step in steps:
        # Act: uniformly at random during the warm-up, then with the policy
        shape = (*run.rows, learner.action_size)
        uniform = torch.rand(shape, generator=random.policy, device=run.device)
        noise = learner.explore(torch.randn(shape, generator=random.policy, device=run.device))
        with watch.measure("stepping"):
            learner.observe(run.observations)
            actions = uniform * 2 - 1 if step <= sac.warmup else learner.act(run.observations, noise)
            actions = learner.start_at_random(actions, noise)
            sent = actions.flatten(0, 1).cpu().numpy()
            run.envs.step_async(sent)
        if config.envs.pipeline:
            learn(run, step, watch)  # from what was stored before this step, while the environments take it
        with watch.measure("stepping", count=0):
            next_observations, rewards, terminated, truncated, infos = run.envs.step_wait()

        # Leave out what is not finite
        transitions = Transitions(run.tasks, sent, rewards, infos["final_obs"], infos)
        stored_rewards, broken = run.faults.sift(transitions, run.normalizer)
        require_finite(run.tasks, next_observations)

        # Store the true next observation: where an episode ended, that is not the one which the next action is for
        outcome = (next_observations, stored_rewards, infos["final_obs"], terminated, truncated)
        next_rows, reward_rows, final_rows, terminated_rows, truncated_rows = run.on_device(*outcome)
        broken_rows = run.on_device(broken)[0].bool() if broken.any() else None
        ends = (terminated_rows.bool(), truncated_rows.bool())
        replay.add(run.observations, actions, reward_rows, final_rows, *ends, broken_rows)
        learner.observe_rewards(reward_rows, ends[0] | ends[1])
        learner.observe_ends(ends[0] | ends[1], uniform[..., 0])  # of no other use after the warm-up
        run.episodes.add((terminated | truncated) & ~broken, infos)
        run.observations = next_rows

        # Learn
        if not config.envs.pipeline:
            learn(run, step, watch)

        # Evaluate on a few goals
        evaluating = config.due(config.eval.every, step)
        evaluated: dict[str, float] = {}
        if evaluating:
            with watch.measure("evaluation"):
                evaluated = run.evaluator.during_training(run.act, step)
            run.keep_best(step, evaluated)

        # Report
        if evaluating or config.due(config.log.every, step) or step == steps[-1]:
            counts = {"train/updates": float(learner.state["updates"]), "rollout/transitions": step * len(run.tasks)}
            counts |= {"train/non_finite": int(learner.non_finite.sum()), "rollout/non_finite": run.faults.count}
            values = counts | run.episodes.pop(run.tasks) | by_task(run.averages.pop(), run.tasks) | evaluated
            if evaluating:
                with watch.measure("evaluation", count=0):
                    show_evaluation(run, step, values)
            times = watch.pop(step, len(run.tasks))
            times["time/elapsed"] = run.elapsed()
            run.log.row(step, values | times)
            if told := run.faults.told():
                run.log.print(f"warning: {told}")
            run.log.tell_non_finite(learner.non_finite, run.tasks, sac.nan_policy)

        # Save
        if config.due(config.checkpoint.every, step) or run.interruption.number:
            run.save(step, required=bool(run.interruption.number))
            run.interruption.end_if_asked()

    last = steps[-1] if steps else run.start
    run.log.print(f"last update {run.elapsed() / 60:.2f} minutes after the start; {watch.shares()}")
    run.save(last, required=True)
    run.interruption.nothing_to_lose = True
    run.interruption.end_if_asked()
    if config.eval.final:
        tags, text = run.evaluator.final(run.act, last)
        run.output.describe(last, tags)
        run.log.print(text)
    return run.folder


def learn(run: Run, step: int, watch: Stopwatch) -> None:
    """The updates of one vector step, on batches from the replay as it is; none during the warm-up.

    Raises:
        NonFiniteError: all that was to be learned from was left out.
    """
    sac, learner, replay, random = run.config.sac, run.learner, run.replay, run.generators
    if step <= sac.warmup or replay.windows == 0:
        if step > sac.warmup and replay.held_back and not replay.written:
            raise NonFiniteError(
                "the first update has nothing to learn from: every vector step had a number not finite."
            )
        return
    for _ in range(sac.updates_per_step):
        with watch.measure("update"):
            batch = replay.gather(replay.draw(sac.batch_per_task, random.replay))
            metrics = learner.update(batch, learner.draw_noise(random.policy, random.aggregation))
            run.averages.add(metrics.per_task | metrics.scalars)
            run.cosines.add(metrics.per_pair)


def show_evaluation(run: Run, step: int, values: dict[str, float]) -> None:
    """Write the gradients' cosines since the last evaluation, and what TensorBoard draws at each."""
    cosines = run.cosines.pop()
    append_rows(run.folder / "gradient_cosines.csv", step, run.tasks, cosines)
    if run.log.tensorboard:
        run.log.tensorboard.evaluation(step, run.tasks, values, cosines, run.learner.parameters())
