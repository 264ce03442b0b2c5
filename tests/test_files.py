"""Files are whole or absent, and a lock is kept by the living only."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from mtrl_imgrad.files import FolderLock, append_whole, check_file, is_locked, read_json, write_whole


class TestWriteWhole:
    def test_replaces_the_text_and_leaves_nothing_beside_it(self, tmp_path):
        write_whole(tmp_path / "a.json", "old")
        write_whole(tmp_path / "a.json", "new")
        assert (tmp_path / "a.json").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_a_failure_leaves_the_old_text(self, tmp_path):
        write_whole(tmp_path / "a.json", "old")
        with pytest.raises(UnicodeEncodeError):
            write_whole(tmp_path / "a.json", "\udc00")
        assert (tmp_path / "a.json").read_text() == "old"

    def test_lines_are_added_to_what_is_there(self, tmp_path):
        for line in ("a\n", "b\n"):
            append_whole(tmp_path / "rows", line)
        assert (tmp_path / "rows").read_text() == "a\nb\n"


class TestCheckFile:
    def test_looking_changes_nothing(self, tmp_path):
        (tmp_path / "old").write_text("old")
        for name in ("old", "new"):
            check_file("json", tmp_path / name)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "old")]

    @pytest.mark.parametrize("name", [".", "n" * 300, "missing/x", "/proc/x"])
    def test_what_cannot_be_a_file_is_named(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"^json: .*; choose another"):
            check_file("json", tmp_path / name)


class TestReadJson:
    @pytest.mark.parametrize(
        "content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, None], ids=["empty", "binary", "half", "deep", "none"]
    )
    def test_what_is_no_json_is_named_in_one_line(self, tmp_path, content):
        if content is not None:
            (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"^run: .*a\.json cannot be read \(\w+\); it must be as"):
            read_json(tmp_path / "a.json")


class TestFolderLock:
    def test_a_second_holder_is_refused_until_the_first_lets_go(self, tmp_path):
        first = FolderLock(tmp_path)
        assert is_locked(tmp_path)
        with pytest.raises(ValueError, match=r"in use by another process \(process \d+\)"):
            FolderLock(tmp_path)
        first.release()
        assert not is_locked(tmp_path)
        FolderLock(tmp_path).release()

    def test_a_killed_process_keeps_nothing(self, tmp_path):
        program = f"""
            import time
            from pathlib import Path
            from mtrl_imgrad.files import FolderLock
            lock = FolderLock(Path({str(tmp_path)!r}))
            print("held", flush=True)
            time.sleep(60)
        """
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stdout.readline() == b"held\n"
            assert is_locked(tmp_path)
            process.kill()
        assert not is_locked(tmp_path)

    def test_looking_leaves_no_file(self, tmp_path):
        assert not is_locked(tmp_path)
        assert list(tmp_path.iterdir()) == []
