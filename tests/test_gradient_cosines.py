"""The gradients' cosines: the picture shows the matrix, the rows are tidy, and both agree with the update's tags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_world import make_world, tiny_config, tiny_sac

from mtrl_imgrad import train
from mtrl_imgrad.aggregators import Mean
from mtrl_imgrad.config import BenchmarkConfig, EvalConfig, LogConfig
from mtrl_imgrad.evaluation import drop_rows_after
from mtrl_imgrad.gradient_cosines import append_rows, heat_map

TASKS = ("east", "north", "west")
COLOURS = {-1.0: "053061", -0.4: "92c5de", 0.0: "f7f7f7", 0.4: "f4a582", 1.0: "67001f"}
"""ColorBrewer's RdBu with eleven classes, from blue to red."""


def cells(picture: np.ndarray) -> np.ndarray:
    """The colour of each cell [K, K, 3] beside its number; the matrix is found by its black frame."""
    dark = picture.max(-1) < 40
    rows, columns = (np.flatnonzero(dark.mean(axis) > 0.3) for axis in (1, 0))
    top, bottom, left = rows[0], rows[-1], columns[0]
    side, tasks = bottom - top, len(TASKS)
    offsets = ((np.arange(tasks) + 0.15) * side / tasks).round().astype(int)
    return picture[top + offsets][:, left + offsets].astype(int)


class TestHeatMap:
    def test_each_cell_has_the_colour_of_its_cosine_in_its_place(self):
        """Rows are not columns: the matrix is not symmetric, as a matrix of cosines would be."""
        matrix = np.array([[1.0, -1.0, 0.0], [0.4, -0.4, 0.0], [-0.4, 1.0, 0.4]])
        expected = [[[int(COLOURS[x][i : i + 2], 16) for i in (0, 2, 4)] for x in row] for row in matrix.tolist()]
        np.testing.assert_allclose(cells(heat_map(matrix, TASKS, "title")), expected, atol=4)

    def test_colours_do_not_depend_on_the_range_of_the_matrix(self):
        weak = np.array([[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -0.1]])
        strong = weak + np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
        here, there = (cells(heat_map(matrix, TASKS, "title")) for matrix in (weak, strong))
        assert (here[[0, 2], [0, 2]] == there[[0, 2], [0, 2]]).all()

    @pytest.mark.parametrize("tasks", [1, 10, 50])
    def test_it_is_a_picture_with_room_for_every_name(self, tasks):
        picture = heat_map(np.eye(tasks), [f"a-rather-long-name-{k}" for k in range(tasks)], "a title of the picture")
        assert picture.dtype == np.uint8
        height, width, colours = picture.shape
        assert colours == 3
        assert min(height, width) > 15 * tasks
        assert max(height, width) < 1500
        assert (picture[[0, -1]] == 255).all()  # nothing is cut off
        assert (picture[:, [0, -1]] == 255).all()


class TestRows:
    def test_each_pair_once_and_appended(self, tmp_path, read_csv):
        matrix = torch.tensor([[1.0, 0.25, -0.5], [0.25, 1.0, 0.123456], [-0.5, 0.123456, 1.0]], dtype=torch.float64)
        append_rows(tmp_path / "rows.csv", 10, TASKS, {"gradients/actor/cosine": matrix})
        append_rows(tmp_path / "rows.csv", 20, TASKS, {"gradients/critic/cosine": -matrix})
        assert [tuple(row.values()) for row in read_csv(tmp_path / "rows.csv")] == [
            ("10", "actor", "east", "north", "0.25000"),
            ("10", "actor", "east", "west", "-0.50000"),
            ("10", "actor", "north", "west", "0.12346"),
            ("20", "critic", "east", "north", "-0.25000"),
            ("20", "critic", "east", "west", "0.50000"),
            ("20", "critic", "north", "west", "-0.12346"),
        ]
        assert list(read_csv(tmp_path / "rows.csv")[0]) == ["step", "network", "task_a", "task_b", "cosine"]

    @pytest.mark.parametrize("cut", [0, 41, 50, 70], ids=lambda cut: f"{cut} bytes left")
    def test_what_a_killed_process_half_wrote_is_gone_when_the_run_goes_on(self, tmp_path, read_csv, cut):
        path = tmp_path / "rows.csv"
        matrix = torch.eye(3, dtype=torch.float64)
        append_rows(path, 100, TASKS, {"gradients/actor/cosine": matrix})
        path.write_bytes(path.read_bytes()[:cut])
        drop_rows_after(path, 50)
        append_rows(path, 100, TASKS, {"gradients/actor/cosine": matrix})
        rows = read_csv(path)
        assert len(rows) == 3
        assert {row["step"] for row in rows} == {"100"}


@pytest.mark.parametrize("jacobian", ["stored", "chunked"])
def test_their_mean_over_pairs_is_the_tag_over_the_same_updates(tmp_path, read_csv, jacobian):
    config = tiny_config(
        tmp_path / "run",
        aggregator=Mean(),
        jacobian=jacobian,
        benchmark=BenchmarkConfig(tasks=TASKS, goals=10),
        sac=tiny_sac(steps=120, warmup=20, batch_per_task=8),
        eval=EvalConfig(every=40, goals_per_task=2, horizon=10),
        log=LogConfig(every=40, tensorboard=False),
    )
    folder = train(config, make_world=make_world)
    rows = read_csv(folder / "gradient_cosines.csv")
    assert len(rows) == 3 * 2 * 3
    for progress in read_csv(folder / "progress.csv"):
        for network in ("critic", "actor"):
            mine = [row for row in rows if row["step"] == progress["step"] and row["network"] == network]
            mean = np.mean([float(row["cosine"]) for row in mine])
            assert mean == pytest.approx(float(progress[f"gradients/{network}/cosine_mean"]), abs=1e-5)
