"""`mtrl-imgrad report`: read run folders, write the report's folder at once or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mtrl_imgrad.files import check_place, is_storage_failure
from mtrl_imgrad.parsing import parse, told_as_user_errors

if TYPE_CHECKING:
    from mtrl_imgrad.report.tables import Table

MANIFEST = "report.json"
"""Names the files of a report, so that a later one replaces these and nothing else."""


@dataclass(frozen=True)
class ReportOptions:
    """Compare runs on success: one HTML page that needs no network, Markdown, CSV, PNG and SVG figures. Runs that are
    still going are in it as far as they are. Runs of another protocol, budget, task list or version of Meta-World or
    MuJoCo than most are left out and named."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs"),)
    """Run folders, or folders that hold run folders."""
    out: Path = Path("report")
    """Folder to write; an earlier report there is replaced."""


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        folder: where; `index.html` is the page.
        final: final success of each group.
        notices: which runs were left out and why, and what else to know first.
        verdict: what the differences by seed show.
    """

    folder: Path
    final: Table
    notices: tuple[str, ...]
    verdict: tuple[str, ...]


def command_report(arguments: Sequence[str]) -> None:
    options: ReportOptions = parse(ReportOptions, arguments, "report")
    with told_as_user_errors():
        report = write_report(options.runs, options.out)
    print(console_text(report))


def write_report(paths: Sequence[Path], out: Path) -> Report:
    """Report on the run folders among the paths and up to two levels below them.

    Raises:
        ValueError: there is no run to report on, or `out` exists and is something else than a report.
        OSError: the report cannot be written.
    """
    # Imported here: matplotlib and scipy take a second, and `mtrl-imgrad --help` needs neither.
    from mtrl_imgrad.report.data import csv_files
    from mtrl_imgrad.report.document import document
    from mtrl_imgrad.report.figures import draw
    from mtrl_imgrad.report.groups import LeftOut, select
    from mtrl_imgrad.report.markdown import markdown
    from mtrl_imgrad.report.page import page
    from mtrl_imgrad.report.results import results
    from mtrl_imgrad.report.tables import final_table, verdict
    from mtrl_imgrad.run_folder import find_run_folders, read_run_folder

    check_place("out", out)
    _refuse_foreign(out)
    runs, unreadable = [], []
    for path in find_run_folders(paths):
        try:
            runs.append(read_run_folder(path))
        except ValueError as error:
            unreadable.append(LeftOut(path, str(error).rstrip(".")))
    if not runs:
        raise ValueError(f"runs: none can be read; the first: {unreadable[0].reason}.")
    selection = select(runs)
    found = results(dataclasses.replace(selection, left_out=(*selection.left_out, *unreadable)))
    figures = draw(found)
    text = document(found, figures)
    files: dict[str, str | bytes] = {"index.html": page(text), "report.md": markdown(text), **csv_files(found)}
    for figure in figures:
        files |= {f"figures/{figure.name}.svg": figure.svg, f"figures/{figure.name}.png": figure.png}
    _write_folder(out, files)
    return Report(out, final_table(found), text.notices, tuple(verdict(found.pairs)))


def console_text(report: Report) -> str:
    """The final success as a table for a terminal, and where the rest is."""
    from mtrl_imgrad.report.tables import printable

    lines = [report.final.columns, *report.final.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(report.final.columns))]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    parts = [*rows, "", *report.final.notes, *report.verdict, *report.notices, str(report.folder / "index.html")]
    return "\n".join(map(printable, parts))


def _refuse_foreign(out: Path) -> None:
    """Only an earlier report is replaced, and only if nothing was added to it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        known = {MANIFEST, *json.loads((out / MANIFEST).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"out: {out} exists and is no report; choose another folder.") from None
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if found - known:
        raise ValueError(f"out: {out} holds {min(found - known)}, which is not of a report; choose another folder.")


def _write_folder(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Write beside the place and rename, so that there is always a whole report or none."""
    place = out.resolve()
    beside, old = (place.with_name(f".{place.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    manifest = {"made_by": "mtrl-imgrad report", "files": sorted(files)}
    try:
        for name, content in (dict(files) | {MANIFEST: json.dumps(manifest, indent=1) + "\n"}).items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if place.exists():
            os.replace(place, old)
        os.replace(beside, place)
    except OSError as error:
        if is_storage_failure(error):
            raise OSError(error.errno, error.strerror, str(out)) from None
        raise OSError(f"out: {out} cannot be written ({error.strerror}); choose another folder.") from None
    finally:
        if old.exists() and not place.exists():
            os.replace(old, place)
        for folder in (beside, old):
            shutil.rmtree(folder, ignore_errors=True)
