"""Meta-World's own MT10, the oracle of several tests, and our goals for it. Constructing it takes seconds."""

from __future__ import annotations

import warnings

import gymnasium
import pytest

from mtrl_imgrad.envs import MT10, make_goals, vector


@pytest.fixture(autouse=True)
def no_workers_unless_asked_for(monkeypatch):
    """Envs are made in this process by default, which takes a tenth of the time that starting workers takes."""
    monkeypatch.setattr(vector, "default_workers", lambda num_tasks: 0)


@pytest.fixture(scope="session")
def mt10_settings():
    return {"seed": 7, "horizon": 60}


@pytest.fixture(scope="session")
def metaworld_mt10(mt10_settings):
    """Meta-World's own vector env, never reset: seeds are for its construction only, so one test may step it."""
    import metaworld  # noqa: F401  (registers the env)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed, horizon = mt10_settings["seed"], mt10_settings["horizon"]
        envs = gymnasium.make_vec("Meta-World/MT10", seed=seed, max_episode_steps=horizon)
    yield envs
    envs.close()


@pytest.fixture(scope="session")
def mt10_goals(mt10_settings):
    return make_goals(MT10, goal_seed=mt10_settings["seed"])
