"""Captions, tiles, tapes, and files that another decoder reads back."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from video_files import decoded

from mtrl_imgrad.envs import MT50
from mtrl_imgrad.video import (
    Caption,
    caption_height,
    columns_of,
    in_a_grid,
    tape_reader,
    tape_writer,
    together,
    with_caption,
    write_gif,
    write_mp4,
)

CAPTION = Caption("drawer-open-v3", goal=3, step=83, horizon=500, success_step=-1, return_=345.4, final=False)
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (120, 120, 120))


def flat(colour, height=96, width=128):
    return np.full((height, width, 3), colour, np.uint8)


def halves(upper, lower):
    """A picture whose upper half has another colour than its lower one."""
    return np.concatenate([flat(upper, 48), flat(lower, 48)])


def written(caption, width=192):
    """The caption's rows alone."""
    return with_caption(flat(0, 40, width), caption)[: caption_height(width)]


class TestCaption:
    def test_the_picture_stands_below_it_unchanged(self):
        picture = np.random.default_rng(0).integers(0, 256, (40, 192, 3), dtype=np.uint8)
        frame = with_caption(picture, CAPTION)
        assert frame.shape == (40 + caption_height(192), 192, 3)
        np.testing.assert_array_equal(frame[caption_height(192) :], picture)

    @pytest.mark.parametrize(
        "change",
        [
            {"task": "drawer-close-v3"},
            {"goal": 4},
            {"step": 84},
            {"success_step": 80},
            {"return_": 346},
            {"final": True},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_each_number_is_seen(self, change):
        assert (written(CAPTION) != written(dataclasses.replace(CAPTION, **change))).any()

    def test_success_changes_the_colour_behind_it(self):
        after = written(dataclasses.replace(CAPTION, success_step=80))
        assert np.median(after[..., 1]) > 2 * np.median(after[..., 0]), "green"
        assert len(np.unique(np.median(written(CAPTION), axis=(0, 1)))) == 1, "grey"

    @pytest.mark.parametrize("width", [192, 240, 320, 480])
    def test_left_and_right_do_not_touch_at_any_size(self, width):
        """The longest texts, on the smallest tile: between them a gap is left in every line, and nothing is cut off."""
        longest = max(MT50, key=len)
        caption = Caption(longest, goal=49, step=500, horizon=500, success_step=500, return_=-5000, final=True)
        band = written(caption, width).astype(int)
        ink = abs(band - band[0, 0]).max(-1) > 8
        assert not ink[:, :3].any()
        assert not ink[:, -3:].any()
        third = len(band) // 3
        for line in (ink[third : 2 * third], ink[2 * third : 3 * third]):
            filled = np.flatnonzero(line.any(0))
            assert np.diff(filled).max() >= 6
        assert ink[:third].any()

    def test_letters_have_a_size_that_can_be_read(self):
        """At least 7 pixels from the top of the tallest letter to its foot on the smallest tile."""
        rows = (written(CAPTION, 192)[: caption_height(192) // 3].max((1, 2)) > 150).sum()
        assert rows >= 7


class TestGrid:
    @pytest.mark.parametrize(("tiles", "shape"), [(1, (1, 1)), (2, (1, 2)), (5, (2, 3)), (10, (2, 5)), (50, (5, 10))])
    def test_every_tile_has_its_place(self, tiles, shape):
        colours = np.random.default_rng(0).integers(40, 256, (tiles, 3))
        grid = in_a_grid([flat(colour, 6, 8) for colour in colours])
        assert grid.shape == (6 * shape[0], 8 * shape[1], 3)
        assert columns_of(tiles) == shape[1]
        for index, place in enumerate(itertools.product(range(shape[0]), range(shape[1]))):
            tile = grid[6 * place[0] : 6 * place[0] + 6, 8 * place[1] : 8 * place[1] + 8]
            np.testing.assert_array_equal(tile, flat(colours[index] if index < tiles else 24, 6, 8))

    def test_a_tile_that_has_ended_stands_still_and_so_does_the_last_grid(self):
        streams = [iter([flat(i, 2, 2) for i in values]) for values in ([1, 2], [5, 6, 7, 8])]
        seen = [(int(grid[0, 0, 0]), int(grid[0, 2, 0])) for grid in together(streams, hold=2)]
        assert seen == [(1, 5), (2, 6), (2, 7), (2, 8), (2, 8), (2, 8)]


class TestTape:
    def test_what_is_read_is_what_was_written(self, tmp_path):
        frames = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
        with tape_writer(tmp_path / "tape") as add:
            for frame in frames:
                add(frame)
        np.testing.assert_array_equal(list(tape_reader(tmp_path / "tape", 12, 10)), frames)

    def test_what_stands_still_takes_next_to_nothing(self, tmp_path):
        still = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        sizes = []
        for count in (1, 50):
            with tape_writer(tmp_path / "tape") as add:
                for _ in range(count):
                    add(still)
            sizes.append((tmp_path / "tape").stat().st_size)
        assert sizes[1] < 1.5 * sizes[0]


class TestFiles:
    def test_an_mp4_has_the_frames_the_size_the_rate_and_the_colours(self, tmp_path):
        frames = [halves(*pair) for pair in itertools.permutations(COLOURS, 2)]
        assert write_mp4(tmp_path / "a.mp4", frames, fps=12) == 12
        seen, about = decoded(tmp_path / "a.mp4")
        assert seen.shape == (12, 96, 128, 3)
        assert abs(seen[:, 8:-8].astype(int) - np.array(frames)[:, 8:-8])[:, np.r_[:32, 48:80]].max() < 12
        assert "Video: h264" in about
        assert "yuv420p(tv, bt709, progressive), 128x96" in about
        assert " 12 fps" in about

    def test_its_index_comes_first(self, tmp_path):
        """Browsers play such a file before they have all of it."""
        write_mp4(tmp_path / "a.mp4", [flat(30)] * 3, fps=10)
        content = (tmp_path / "a.mp4").read_bytes()
        assert 0 < content.index(b"moov") < content.index(b"mdat")

    def test_a_gif_is_smaller_in_time_and_size_and_repeats(self, tmp_path):
        frames = [halves(COLOURS[i // 20], COLOURS[0]) for i in range(40)]
        write_mp4(tmp_path / "a.mp4", frames, fps=20)
        write_gif(tmp_path / "a.gif", tmp_path / "a.mp4", tmp_path / "palette.png", fps=10, width=64)
        seen, about = iio.imread(tmp_path / "a.gif"), iio.immeta(tmp_path / "a.gif")
        assert seen.shape == (20, 48, 64, 3)
        assert (about["duration"], about["loop"]) == (100, 0)
        for frame, colour in ((seen[3], COLOURS[0]), (seen[-3], COLOURS[1])):
            assert abs(frame[4:20].astype(int) - colour).mean() < 12

    @pytest.mark.parametrize("script", ["exit 3", "cat >/dev/null; exit 3"], ids=["at once", "at the end"])
    def test_an_encoder_that_fails_is_told_with_its_last_words(self, tmp_path, monkeypatch, script):
        fake = tmp_path / "ffmpeg"
        fake.write_text(f"#!/bin/sh\necho first >&2; echo 'No space left' >&2\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
        with pytest.raises(OSError, match="format: ffmpeg ended with code 3: No space left"):
            write_mp4(tmp_path / "a.mp4", [flat(30)] * 50, fps=10)

    def test_without_an_encoder_one_line_says_what_to_install(self, tmp_path, monkeypatch):
        def missing():
            raise RuntimeError("No ffmpeg exe could be found.")

        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
        with pytest.raises(OSError, match=r"there is no ffmpeg here; `pip install imageio-ffmpeg`"):
            write_mp4(tmp_path / "a.mp4", [flat(30)], fps=10)

    def test_an_error_in_the_frames_ends_the_encoder(self, tmp_path, monkeypatch):
        started = []

        class Watched(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                started.append(self)

        def frames():
            yield flat(30)
            raise ZeroDivisionError

        monkeypatch.setattr(subprocess, "Popen", Watched)
        with pytest.raises(ZeroDivisionError):
            write_mp4(tmp_path / "a.mp4", frames(), fps=10)
        (process,) = started
        assert process.returncode is not None
