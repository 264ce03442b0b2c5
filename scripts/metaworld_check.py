"""Plays a run's newest policy in Meta-World's own environments, and says whether `mtrl-imgrad evaluate` told the truth.

    python scripts/metaworld_check.py runs/mt10-imgrad-s1
    python scripts/metaworld_check.py runs/mt10-imgrad-s1 --goal-seed 99 --out unseen.csv

Nothing of mtrl_imgrad but the policy takes part: one environment, one observation, one step at a time, with
Meta-World's `success`, for the run's evaluation horizon. On the run's goals (the first) every episode is compared with
its row in eval.csv, and the exit code is 1 where a success differs; returns may differ a little, since a network
rounds one observation otherwise than ten together. With `--goal-seed` (the second) the goals are Meta-World's own for
another seed, which training has not seen. `--out` keeps every episode.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import metaworld
import numpy as np
import torch
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.types import Task

import mtrl_imgrad
from mtrl_imgrad.agent import Policy
from mtrl_imgrad.envs.goals import Goals
from mtrl_imgrad.files import read_object


def play(env: Any, policy: Policy, task: Task, horizon: int, to_the_end: bool) -> tuple[bool, float]:
    """Whether some step of the episode had Meta-World's success, and the sum of its rewards up to its end or, if that
    will do, up to the success."""
    env.set_task(task)
    observation, _ = env.reset()
    success, total, steps = False, 0.0, 0
    while steps < horizon and (to_the_end or not success):
        action, _ = policy.predict(observation.astype(np.float32), deterministic=True)
        for _ in range(min(policy.action_repeat, horizon - steps)):
            observation, reward, _, _, info = env.step(action)
            success |= bool(info["success"])
            total += float(reward)
            steps += 1
    return success, total


def told(run: Path, task: str) -> dict[int, tuple[bool, float]]:
    """Success and return of each goal in the newest evaluation on all goals."""
    with (run / "eval.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task]
    newest = max(int(row["step"]) for row in rows)
    return {
        int(row["goal"]): (row["success"] == "1", float(row["return"])) for row in rows if int(row["step"]) == newest
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("run", type=Path, help="run folder, trained and evaluated")
    found.add_argument("--goals", type=int, default=50, help="goals per task, the first ones")
    found.add_argument("--goal-seed", type=int, help="seed of other goals than the run's")
    found.add_argument("--out", type=Path, help="CSV file of task, goal and success of each episode")
    return found


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)  # a policy that decides for one observation has nothing to share
    agent = mtrl_imgrad.load(options.run)
    if agent.config.benchmark.reward != "v2":
        sys.exit(
            "metaworld_check: Meta-World's environments give the v2 reward unless told otherwise; this run's is v1."
        )
    goals = Goals.from_dict(read_object(options.run / "goals.json"))
    differ, rates, episodes = 0, [], []
    for name in agent.tasks:
        env, policy = ALL_V3_ENVIRONMENTS[name](), agent.policy(name)
        if options.goal_seed is None:
            tasks, expected = goals.metaworld_tasks(name), told(options.run, name)
        else:
            tasks, expected = metaworld.MT1(name, seed=options.goal_seed).train_tasks, {}
        horizon, chosen = agent.config.eval.horizon, tasks[: options.goals]
        found = [play(env, policy, task, horizon, to_the_end=bool(expected)) for task in chosen]
        env.close()
        rates.append(float(np.mean([success for success, _ in found])))
        episodes += [(name, goal, int(success)) for goal, (success, _) in enumerate(found)]
        line = f"{name:28} {rates[-1]:.2f} of {len(found)} goals"
        if expected:
            wrong = sum(success != expected[goal][0] for goal, (success, _) in enumerate(found))
            apart = max(abs(total - expected[goal][1]) for goal, (_, total) in enumerate(found))
            line += f"; success differs from eval.csv on {wrong}, return by {apart:.2g} at most"
            differ += wrong
        print(line, flush=True)
    print(f"{'mean over tasks':28} {np.mean(rates):.3f}")
    if options.out:
        with options.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("task", "goal", "success"), *episodes])
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
