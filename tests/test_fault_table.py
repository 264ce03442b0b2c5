"""docs/faults.md promises nothing without a test: each that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")][1:]
TEST = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)*)`")


def names(path: Path) -> set[str]:
    """`::TestClass`, `::TestClass::test_name` and `::test_name` of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            own = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            found |= {f"::{node.name}"} | {f"::{node.name}::{inner.name}" for inner in own}
        elif isinstance(node, ast.FunctionDef):
            found.add(f"::{node.name}")
    return found


@pytest.mark.parametrize("line", TABLE, ids=[line.split("|")[1].strip()[:40] for line in TABLE])
def test_every_promise_names_tests_that_exist(line):
    fault, promise, tests = (cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
    assert fault
    assert promise
    named = TEST.findall(tests)
    assert named, f"{fault} has no test"
    for file, name in named:
        assert (ROOT / file).is_file(), file
        assert not name or name in names(ROOT / file), f"{file}{name}"


def test_the_table_is_not_empty():
    assert len(TABLE) >= 10
