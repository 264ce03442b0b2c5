"""Worker processes: the same numbers wherever rows are stepped, and an end without remains however it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zero_cost

from mtrl_imgrad.envs import Goals, MetaworldVectorEnv, dealing, make_goals, vector
from mtrl_imgrad.envs.worker_pool import Worker, WorkerError

TASKS = ("reach-v3", "push-v3", "window-open-v3")
ZERO_COST_GOALS = Goals(0, {task: np.arange(50.0)[:, None] for task in TASKS})


@pytest.fixture
def make_env():
    """Constructs vector envs over rows that cost nothing, and closes them after the test."""
    envs = []

    def make(maker=zero_cost.ZeroCost, *, workers: int | None = 2, seed=0, **arguments: Any):
        envs.append(MetaworldVectorEnv(TASKS, ZERO_COST_GOALS, seed=seed, workers=workers, maker=maker, **arguments))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


@pytest.fixture(scope="module")
def goals():
    return make_goals(TASKS, goal_seed=3)


def actions_for(env, value=1.0):
    return np.full((env.num_envs, 4), value, np.float32)


def processes_of(env) -> list[psutil.Process]:
    return [psutil.Process(worker.process.pid) for worker in env._pool.workers]


def wait_until(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def all_gone(pids) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


class TestNumbers:
    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_they_do_not_depend_on_the_number_of_workers(self, goals, workers):
        arguments: dict[str, Any] = {"seed": 1, "horizon": 20, "envs_per_task": 2, "action_repeat": 3}
        here = MetaworldVectorEnv(TASKS, goals, workers=0, **arguments)
        there = MetaworldVectorEnv(TASKS, goals, workers=workers, self_check=False, **arguments)
        assert_same_step((here.reset(),), (there.reset(),))
        random = np.random.default_rng(0)
        for _ in range(22):  # over three autoresets
            actions = random.uniform(-1.2, 1.2, (6, 4)).astype(np.float32)
            assert_same_step(here.step(actions), there.step(actions))
        state = json.loads(json.dumps(here.reset() and here.state_dict()))
        np.testing.assert_array_equal(there.load_state_dict(state)[0], here.load_state_dict(state)[0])
        assert_same_step(here.step(actions), there.step(actions))
        here.close()
        there.close()

    def test_an_env_that_shares_workers_changes_nothing_for_the_other(self, goals):
        """Evaluation in the middle of an episode of training: other goals, another reward and another horizon."""
        alone, sharing = (
            MetaworldVectorEnv(TASKS, goals, seed=1, horizon=15, workers=workers, envs_per_task=2) for workers in (0, 2)
        )
        assert_same_step((alone.reset(),), (sharing.reset(),))
        actions = np.random.default_rng(0).uniform(-1, 1, (20, 6, 4)).astype(np.float32)
        for step in range(20):
            if step == 7:
                evaluation = MetaworldVectorEnv(TASKS, goals, seed=0, horizon=9, reward="v1", share=sharing)
                expected = MetaworldVectorEnv(TASKS, goals, seed=0, horizon=9, reward="v1", fast=False)
                chosen = {"goals": np.array([[4, 5], [6, 7], [8, 9]])}
                assert_same_step((evaluation.reset(options=chosen),), (expected.reset(options=chosen),))
            if 7 <= step < 18:
                assert_same_step(evaluation.step(actions[step, :3]), expected.step(actions[step, :3]))
            assert_same_step(sharing.step(actions[step]), alone.step(actions[step]))
        pids = [process.pid for process in processes_of(sharing)]
        evaluation.close()
        assert_same_step(sharing.step(actions[0]), alone.step(actions[0]))
        sharing.close()
        assert all_gone(pids)
        for env in (alone, expected):
            env.close()


def assert_same_step(left, right):
    *left_arrays, left_infos = left if len(left) > 1 else left[0]
    *right_arrays, right_infos = right if len(right) > 1 else right[0]
    assert left_infos.keys() == right_infos.keys()
    for ours, theirs in zip(left_arrays, right_arrays, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    for name in left_infos:
        assert left_infos[name].tobytes() == right_infos[name].tobytes(), name


class TestRows:
    def test_every_task_is_stepped_by_one_of_the_workers(self, make_env):
        env = make_env(envs_per_task=2)
        observations, infos = env.reset()
        pids = observations[:, 2].reshape(3, 2)
        assert (pids[:, 0] == pids[:, 1]).all()
        assert {int(pid) for pid in pids.flatten()} == {process.pid for process in processes_of(env)}
        np.testing.assert_array_equal(observations[:, 0], infos["goal"])

    @pytest.mark.parametrize(("wanted", "used"), [(1, 1), (2, 2), (9, 3)])
    def test_there_are_at_most_as_many_workers_as_tasks(self, make_env, wanted, used):
        assert len(processes_of(make_env(workers=wanted))) == used

    def test_by_default_there_are_as_many_as_cores(self, make_env, monkeypatch):
        monkeypatch.setattr(vector, "default_workers", dealing.default_workers)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
        assert len(processes_of(make_env(workers=None))) == 2
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        assert not hasattr(make_env(workers=None)._pool, "workers")

    def test_actions_and_results_are_those_of_the_row(self, make_env):
        env = make_env(envs_per_task=2, horizon=2)
        env.reset(options={"goals": np.arange(12).reshape(6, 2)})
        actions = np.arange(24, dtype=np.float32).reshape(6, 4)
        _, rewards, _, _, _ = env.step(actions)
        assert rewards.tolist() == actions[:, 0].tolist()
        observations, _, _, truncated, infos = env.step(actions)
        assert truncated.all()
        assert observations[:, :2].tolist() == [[2 * row + 1, 0] for row in range(6)]
        assert infos["final_obs"][:, :2].tolist() == [[2 * row, 2] for row in range(6)]

    def test_a_step_runs_while_the_caller_does_something_else(self, make_env):
        env = make_env()
        env.reset()
        env.step_async(actions_for(env))
        wait_until(lambda: (env._block.observations[:, 1] == 1).all())
        env.step_wait()

    def test_a_reset_may_follow_a_step_that_nobody_waited_for(self, make_env):
        env = make_env()
        env.reset()
        env.step_async(actions_for(env))
        observations, _ = env.reset()
        assert (observations[:, 1] == 0).all()
        assert (env.step(actions_for(env))[0][:, 1] == 1).all()

    def test_warnings_of_workers_name_the_task(self, make_env):
        with pytest.warns(RuntimeWarning, match="push-v3: differs"):
            make_env(zero_cost.Warning_)


class TestInterruptions:
    """A KeyboardInterrupt, of Ctrl-C or a notebook's stop button, may come at any moment; a test sends it itself."""

    @pytest.fixture
    def interrupted(self, make_env, monkeypatch):
        """An env that was interrupted while it waited for its second worker."""

        def interrupt(workers, owner, name):
            env = make_env(workers=workers)
            env.reset()
            env.step(actions_for(env))
            original, calls = getattr(owner, name), []

            def interrupting(*arguments):
                calls.append(arguments)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return original(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupting)
                with pytest.raises(KeyboardInterrupt):
                    env.step(actions_for(env))
            return env

        return interrupt

    @pytest.mark.parametrize(
        ("workers", "owner", "name"),
        [(2, Worker, "receive"), (2, Worker, "send"), (0, zero_cost.ZeroCostRow, "step")],
        ids=["waiting", "asking", "in this process"],
    )
    def test_a_step_that_was_interrupted_is_over_with_a_reset_and_no_answer_is_taken_for_another(
        self, interrupted, workers, owner, name
    ):
        env = interrupted(workers, owner, name)
        with pytest.raises(RuntimeError, match="call reset"):
            env.step(actions_for(env))
        with pytest.raises(RuntimeError, match="no step is under way"):
            env.step_wait()
        with pytest.raises(RuntimeError, match="state_dict is valid after reset"):
            env.state_dict()
        if name != "send":
            observations, _ = env.reset()
            assert (observations[:, 1] == 0).all()
            for step in (1, 2, 3):
                assert (env.step(actions_for(env, step))[1] == step).all()
        else:  # one worker was never asked, and the answer that would be waited for never comes
            env.close()

    def test_two_envs_that_share_workers_may_step_at_the_same_time(self, make_env):
        first = make_env()
        second = make_env(share=first)
        for env in (first, second):
            env.reset(options={"goals": np.zeros((3, 1), int)})
        for step in range(1, 4):
            first.step_async(actions_for(first, step))
            _, rewards, *_ = second.step(actions_for(second, 10 * step))
            assert (rewards == 10 * step).all()
            second.step_async(actions_for(second, -step))
            assert (first.step_wait()[1] == step).all()
            assert (second.step_wait()[1] == -step).all()


class TestFailures:
    @pytest.mark.parametrize(
        ("maker", "message"),
        [
            (zero_cost.Dying, r"^worker \d \(.*push-v3.*\) has ended with exit code -9 \(SIGKILL\)\.$"),
            (zero_cost.Leaving, r"^worker \d \(.*push-v3.*\) has ended with exit code 3\.$"),
            (zero_cost.Failing, r"^worker \d \(.*push-v3.*\) has failed with\nArithmeticError: the simulator has expl"),
            (zero_cost.Hanging, r"^worker \d \(.*push-v3.*\) has not answered for \d+ seconds; it was ended\.$"),
        ],
        ids=["killed", "exits", "raises", "hangs"],
    )
    def test_a_worker_that_goes_wrong_ends_the_run_within_ten_seconds(self, make_env, maker, message):
        env = make_env(maker)
        pids = [process.pid for process in processes_of(env)]
        env.reset()
        env.step(actions_for(env))
        env.step(actions_for(env))
        started = time.monotonic()
        with pytest.raises(WorkerError, match=message) as error:
            env.step(actions_for(env))
        assert time.monotonic() - started < 10
        assert str(error.value).count("\n") <= 1
        assert all_gone(pids)
        with pytest.raises(WorkerError):
            env.reset()

    def test_rows_that_cannot_be_made_are_told(self, make_env):
        with pytest.raises(WorkerError, match=r"worker 0 .*\nLookupError: no model for"):
            make_env(zero_cost.NeverMade)

    def test_a_worker_that_takes_long_to_make_its_rows_has_not_hung(self, make_env):
        """Also after the first rows: a model may come from a slow disk, to a busy core."""
        make_env(zero_cost.SlowlyMade, workers=1).reset()

    def test_a_stopped_worker_counts_as_hanging(self, make_env):
        env = make_env()
        env.reset()
        processes_of(env)[1].suspend()
        started = time.monotonic()
        with pytest.raises(WorkerError, match=r"^worker 1 .* has not answered"):
            env.step(actions_for(env))
        assert time.monotonic() - started < 10

    def test_a_worker_killed_between_steps_is_named(self, make_env):
        env = make_env()
        env.reset()
        processes_of(env)[0].kill()
        time.sleep(0.1)
        with pytest.raises(WorkerError, match=r"^worker 0 .*exit code -9"):
            env.step(actions_for(env))


SCRIPT = textwrap.dedent("""
    import numpy as np, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    sys.path.insert(0, {here!r})
    import zero_cost
    from mtrl_imgrad.envs import Goals, MetaworldVectorEnv
    tasks = ("reach-v3", "push-v3", "window-open-v3")
    goals = Goals(0, {{task: np.arange(50.0)[:, None] for task in tasks}})
    envs = MetaworldVectorEnv(tasks, goals, seed=0, workers=2, maker=zero_cost.ZeroCost)
    envs.reset()
    print(*(worker.process.pid for worker in envs._pool.workers), flush=True)
    {then}
""")
FOR_EVER = "while True: envs.step(np.zeros((3, 4), np.float32))"


@pytest.fixture
def run_script(tmp_path):
    """Starts a script without a `__main__` guard, and returns it and the pids of its workers."""
    started = []

    def run(then: str, *, way: str = "file"):
        code = SCRIPT.format(here=str(Path(__file__).parent), then=then)
        path = tmp_path / "script.py"
        path.write_text(code)
        arguments = {"file": [str(path)], "-c": ["-c", code], "stdin": []}[way]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)}
        script = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(script)
        if way == "stdin":
            script.stdin.write(code)
        script.stdin.close()
        return script, [int(pid) for pid in script.stdout.readline().split()]

    yield run
    for script in started:
        script.kill()
        script.wait()
        script.stdout.close()
        script.stderr.close()


class TestEnds:
    @pytest.mark.parametrize("way", ["file", "-c", "stdin"])
    def test_a_script_needs_no_main_guard(self, run_script, way):
        script, pids = run_script("envs.step(np.zeros((3, 4), np.float32)); envs.close(); print('done')", way=way)
        assert script.wait(30) == 0, script.stderr.read()
        assert script.stdout.read() == "done\n"
        assert script.stderr.read() == ""
        assert len(pids) == 2
        assert all_gone(pids)

    def test_an_env_that_is_not_closed_ends_with_the_script(self, run_script):
        script, pids = run_script("envs.step_async(np.zeros((3, 4), np.float32))")
        assert script.wait(30) == 0
        assert script.stderr.read() == ""
        wait_until(lambda: all_gone(pids))

    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda stop: stop.name)
    def test_no_worker_outlives_a_script_that_is_stopped(self, run_script, stop):
        script, pids = run_script(FOR_EVER)
        before = shared_memory()
        os.killpg(script.pid, stop)  # as a terminal does: the whole process group
        assert script.wait(10) != 0
        wait_until(lambda: all_gone(pids))
        assert shared_memory() <= before

    def test_a_fork_of_the_parent_does_not_keep_orphans_alive(self, run_script):
        """It holds the parent's ends of the sockets open, and lives on for a while."""
        script, pids = run_script("import os\nif os.fork() == 0: time.sleep(15); os._exit(0)\n" + FOR_EVER)
        time.sleep(0.3)
        os.kill(script.pid, signal.SIGKILL)
        wait_until(lambda: all_gone(pids))

    def test_closing_an_env_leaves_no_process_and_no_open_file(self, make_env):
        me = psutil.Process()
        before = me.num_fds()
        env = make_env()
        env.reset()
        env.step_async(actions_for(env))
        pids = [process.pid for process in processes_of(env)]
        env.close()
        env.close()
        assert all_gone(pids)
        assert me.num_fds() == before

    def test_an_env_that_nobody_holds_any_more_is_closed(self, make_env):
        env = MetaworldVectorEnv(TASKS, ZERO_COST_GOALS, seed=0, workers=1, maker=zero_cost.ZeroCost)
        pids = [process.pid for process in processes_of(env)]
        del env
        wait_until(lambda: all_gone(pids))


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
