"""Tables are read without what a killed process left half written, and refused where they are none."""

from __future__ import annotations

import pytest

from mtrl_imgrad.csv_files import csv_text, read_rows


@pytest.mark.parametrize("end", ["", "3", "\0" * 64, "\udcff\udcfe", "30,", "30,x", '30,"x', "30,x,y\r\n"])
def test_a_last_row_that_is_not_whole_is_left_out(tmp_path, end):
    whole = csv_text([("step", "task"), (10, "a,b"), (20, "c")])
    (tmp_path / "a.csv").write_bytes((whole + end).encode("utf-8", "surrogateescape"))
    assert read_rows(tmp_path / "a.csv") == [["step", "task"], ["10", "a,b"], ["20", "c"]]


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "a.csv") == []


@pytest.mark.parametrize(
    "content", [b"\xff\n", b"step\nten\n", b"step\n\x00\n", b"x" * 10, b"step\n-1\n", b"step,task\n1\n2,a\n"]
)
def test_what_is_no_table_is_named_in_one_line(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^run: .*a\.csv is not a table of a run \(\w+\); it must be as the run wrote it\.$"
    ):
        read_rows(tmp_path / "a.csv")
