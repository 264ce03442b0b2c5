"""What a video shows is what `evaluate` measures; a mistake is told before anything is played."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from tiny_world import tiny_config, tiny_sac
from video_files import decoded

from mtrl_imgrad import cli, train
from mtrl_imgrad.config import BenchmarkConfig, EnvsConfig, EvalConfig, NetworkConfig
from mtrl_imgrad.envs import MetaworldVectorEnv, make_goals
from mtrl_imgrad.envs.rendering import graphics_library
from mtrl_imgrad.evaluation import evaluate
from mtrl_imgrad.playback import Show, make_env, play
from mtrl_imgrad.record import RecordOptions, chosen_goals, record
from mtrl_imgrad.video import caption_height

TASKS = ("reach-v3", "drawer-close-v3")
HORIZON, REPEAT = 60, 2
EXPERT_HORIZON = 200
"""Steps in which the scripted policies succeed."""
SMALL = ("--size", "192x192", "--device", "cpu")


def settings(run_dir="", horizon=HORIZON):
    return tiny_config(
        run_dir,
        benchmark=BenchmarkConfig(tasks=TASKS, goals=3),
        network=NetworkConfig(kind="multi_head", width=16, depth=2),
        envs=EnvsConfig(horizon=HORIZON, action_repeat=REPEAT, workers=0, self_check="off"),
        sac=tiny_sac(steps=240, warmup=120, batch_per_task=16),
        eval=EvalConfig(every=0, horizon=horizon),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was trained and evaluated, for seconds: its agent moves, and knows nothing."""
    return train(settings(tmp_path_factory.mktemp("record") / "run"))


@dataclass(frozen=True)
class Expert:
    """Meta-World's scripted policies as an agent, which succeed."""

    tasks: tuple[str, ...] = TASKS
    step: int = 7

    @property
    def config(self):
        return settings(horizon=EXPERT_HORIZON)

    def policy(self, task):
        from metaworld.policies import ENV_POLICY_MAP

        scripted = ENV_POLICY_MAP[task]()

        def predict(observations, deterministic):
            assert deterministic
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the scripts say that their actions will be clipped
                actions = [scripted.get_action(row) for row in np.asarray(observations, np.float64)]
            return np.clip(actions, -1, 1).astype(np.float32), None

        return SimpleNamespace(predict=predict)


@pytest.fixture
def failing_ffmpeg(tmp_path, monkeypatch):
    """An encoder that ends with an error after it has written something."""
    fake = tmp_path / "ffmpeg"
    fake.write_text('#!/bin/sh\nfor last; do :; done\necho half > "$last"\necho "No space left" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))


@pytest.fixture(scope="module")
def goals():
    return make_goals(TASKS, goal_seed=0, num_goals=3)


@pytest.fixture(scope="module")
def evaluated(goals):
    """The same policy's evaluation: all tasks at once, all goals in one go, no camera."""
    agent = Expert()
    policies = [agent.policy(task) for task in TASKS]

    def act(observations):
        pairs = zip(policies, observations.numpy(), strict=True)
        return torch.as_tensor(np.stack([policy.predict(rows, deterministic=True)[0] for policy, rows in pairs]))

    envs = MetaworldVectorEnv(TASKS, goals, seed=0, horizon=EXPERT_HORIZON, action_repeat=REPEAT, workers=0)
    rows = evaluate(act, envs, TASKS, np.arange(3), agent.step, agent.config)
    envs.close()
    return rows


@pytest.mark.usefixtures("needs_graphics")
class TestPlaying:
    @pytest.mark.parametrize("task", TASKS)
    def test_success_and_return_are_those_of_an_evaluation(self, goals, evaluated, task):
        show = Show("corner4", 192, 192, fps=1, speed=1.0)
        env = make_env(Expert().config, goals, task, show)
        captions = []
        rows = [row for row in evaluated if row.task == task]
        for row in rows:
            played = play(env, Expert(), task, row.goal, row.episode, show, lambda _, caption: captions.append(caption))
            assert played == row
            assert captions[-1].final
            assert (captions[-1].success_step, captions[-1].return_) == (row.steps_to_success, row.return_)
        env.close()
        assert any(row.success for row in rows), "an expert that never succeeds proves nothing"

    def test_success_is_told_from_its_step_on_and_the_task_is_left_soon_after(self, goals):
        show = Show("corner4", 192, 192, fps=20, speed=1.0)
        env = make_env(Expert().config, goals, "reach-v3", show)
        frames = []
        played = play(env, Expert(), "reach-v3", 0, 0, show, lambda *frame: frames.append(frame))
        env.close()
        captions = [caption for _, caption in frames[:-1]]
        assert 0 < played.steps_to_success < EXPERT_HORIZON - 40
        for caption in captions:
            assert caption.success_step == (played.steps_to_success if caption.step >= played.steps_to_success else -1)
        assert 0 < captions[-1].step - played.steps_to_success <= 40
        assert (frames[0][0] != frames[-1][0]).any()

    @pytest.mark.parametrize(("fps", "speed"), [(20, 1.0), (10, 0.5), (80, 1.0), (30, 1.0), (80, 0.25), (7, 3.0)])
    def test_the_video_plays_at_the_speed_that_was_asked_for(self, fps, speed):
        """A second of simulated time, 80 steps, fills fps / speed frames, whenever it is looked at."""
        show = Show("corner4", 192, 192, fps, speed)
        for step in range(500):
            assert abs((show.frames_due(step) - 1) - step * fps / (80 * speed)) < 1
        assert show.frames_due(400) - show.frames_due(0) == pytest.approx(5 * fps / speed, abs=1)


@pytest.mark.usefixtures("needs_graphics")
class TestFiles:
    def test_the_numbers_of_the_run_folder_come_back(self, run, tmp_path, read_csv):
        """A learned policy, through the run folder: every number is that of eval.csv, digit by digit."""
        episodes = []
        options = RecordOptions(run, task=(*TASKS, "all"), out=tmp_path, size="192x192", device="cpu", fps=5)
        videos = list(record(options, episodes.append))
        told = {(row["task"], row["goal"]): row for row in read_csv(run / "eval.csv")}
        assert len(told) == 6
        assert len(episodes) == 12
        for episode in episodes:
            row = told[episode.task, str(episode.goal)]
            assert (str(episode.success), str(episode.return_)) == (row["success"], row["return"])
            assert str(episode.steps_to_success) == row["steps_to_success"]
        assert [video.tasks for video in videos] == [("reach-v3",), ("drawer-close-v3",), TASKS]
        names = {f"0000000240-{name}.mp4" for name in (*TASKS, "all")}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert {path for video in videos for path in video.files} == {tmp_path / name for name in names}

    def test_tiles_show_different_tasks_below_their_captions(self, run, tmp_path):
        (video,) = record(RecordOptions(run, episodes=2, out=tmp_path, size="192x224", device="cpu", fps=10))
        frames, about = decoded(video.files[0])
        # Two episodes: the start, a frame for every 8 of 60 steps, and the result, which stands for a second.
        assert frames.shape == (2 * (1 + 7 + 1 + 10), 224, 384, 3)
        assert " 10 fps" in about
        assert video.seconds == pytest.approx(len(frames) / 10)
        left, right = frames[0, :, :192].astype(int), frames[0, :, 192:].astype(int)
        band = caption_height(192)
        assert abs(left - right)[band:].max() > 100, "a drawer on one side only"
        assert np.median(left[band:]) > 50 > np.median(left[:band])

    def test_both_formats_land_in_the_run_folder_unless_told_otherwise(self, run, capsys):
        arguments = [str(run), "--task", "reach-v3", "--goals", "2", "0", "--format", "both", "--fps", "20", *SMALL]
        assert cli.main(["record", *arguments]) == 0
        mp4, gif = (run / "videos" / f"0000000240-reach-v3.{suffix}" for suffix in ("mp4", "gif"))
        assert iio.imread(gif).shape[1:] == (192, 192, 3)
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == [
            "reach-v3, goal 2",
            "reach-v3, goal 0",
            str(mp4),
            str(gif),
        ]
        assert f"{mp4.stat().st_size / 1e6:.2f} MB" in lines[2]

    def test_a_failing_encoder_leaves_what_was_there(self, run, tmp_path, capsys, failing_ffmpeg):
        out = tmp_path / "videos"
        out.mkdir()
        earlier = out / "0000000240-reach-v3.mp4"
        earlier.write_text("an earlier video")
        arguments = [str(run), "--task", "reach-v3", "--episodes", "1", "--out", str(out), *SMALL]
        assert cli.main(["record", *arguments]) == 2
        assert "format: ffmpeg ended with code 1: No space left" in capsys.readouterr().err
        assert list(out.iterdir()) == [earlier]
        assert earlier.read_text() == "an earlier video"


@pytest.mark.parametrize(("available", "goals"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (50, [0, 24, 49])])
def test_without_a_number_there_are_three_episodes_or_as_many_as_the_run_has_goals(available, goals):
    assert chosen_goals(RecordOptions(Path("run")), available) == goals


def test_goals_are_played_as_given_whatever_their_number():
    assert chosen_goals(RecordOptions(Path("run"), goals=(0,)), 1) == [0]
    assert chosen_goals(RecordOptions(Path("run"), goals=(4, 4, 0, 2, 1)), 5) == [4, 4, 0, 2, 1]


class TestMistakes:
    @pytest.mark.usefixtures("needs_graphics")
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--task", "drawer-clos-v3"), "task: 'drawer-clos-v3' is not one of this agent's 2; the nearest is"),
            (("--camera", "corner5"), "camera: 'corner5' is no camera of Meta-World's; the nearest is 'corner"),
            (("--size", "480"), "size: '480' is not allowed; it must be WIDTHxHEIGHT, even numbers from 192 to 2160"),
            (("--size", "481x480"), "size: '481x480' is not"),
            (("--size", "100x100"), "size: '100x100' is not"),
            (("--fps", "0"), "fps: 0 is not above 0"),
            (("--speed", "0"), "speed: 0.0 is not above 0"),
            (("--speed", "nan"), "speed: nan is not above 0"),
            (("--goals", "0", "3"), "goals: 3 is not between 0 and 2"),
            (("--episodes", "4"), "episodes: 4 is not between 1 and 3"),
            (("--episodes", "1", "--goals", "0"), "episodes: not allowed with goals"),
            (("--episodes", "0"), "episodes: 0 is not between 1 and 3"),
            (("--format", "avi"), "avi"),
            (("--task",), "task"),
        ],
        ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
    )
    def test_a_wrong_option_is_told_in_two_lines(self, run, tmp_path, capsys, arguments, message):
        code = cli.main(["record", str(run), "--out", str(tmp_path / "out"), *arguments])
        told = capsys.readouterr().err
        assert code == 2
        assert message in told
        assert len(told.splitlines()) <= 2
        assert not (tmp_path / "out").exists()

    @pytest.mark.usefixtures("needs_graphics")
    def test_a_folder_that_is_no_run(self, tmp_path, capsys):
        assert cli.main(["record", str(tmp_path)]) == 2
        assert "no run folder" in capsys.readouterr().err

    @pytest.mark.usefixtures("needs_graphics")
    def test_a_place_that_cannot_be_written_to(self, run, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert cli.main(["record", str(run), "--out", str(tmp_path / "file")]) == 2
        assert "out: " in capsys.readouterr().err

    @pytest.mark.parametrize("chosen", [None, "osmesa"])
    def test_without_a_graphics_library_it_says_what_to_install(self, tmp_path, monkeypatch, capsys, chosen):
        """Every library is hidden from the processes that try them."""
        monkeypatch.setenv("PYOPENGL_PLATFORM", "none")
        monkeypatch.setattr("mtrl_imgrad.envs.rendering.LIBRARIES", {sys.platform: ("egl", "osmesa")})
        if chosen:
            monkeypatch.setenv("MUJOCO_GL", chosen)
        else:
            monkeypatch.delenv("MUJOCO_GL", raising=False)
        graphics_library.cache_clear()
        code = cli.main(["record", str(tmp_path)])
        graphics_library.cache_clear()
        first, second = capsys.readouterr().err.splitlines()
        assert code == 2
        assert f"no graphics library works here (tried {chosen or 'egl, osmesa'})" in first
        assert "libosmesa6" in second
        assert "libegl1" in second
