"""A report as Markdown with GitHub's tables, figures beside it."""

from __future__ import annotations

import re
from html import escape

from mtrl_imgrad.report.document import Commands, Document, Part, Section
from mtrl_imgrad.report.tables import Table, printable


def markdown(document: Document) -> str:
    """The report; figures are linked as `figures/<name>.svg`."""
    facts = "\n".join(f"* {text(name)}: {text(value)}" for name, value in document.facts.items())
    notices = "".join(f"> {text(notice)}\n\n" for notice in document.notices)
    sections = "\n".join(_section(section) for section in document.sections)
    return f"# {text(document.title)}\n\n{facts}\n\n{notices}{sections}"


def text(raw: str) -> str:
    """Any text as Markdown that shows it: no HTML, no table borders, no emphasis, no links, on one line."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(_line(raw), quote=False))


def table_text(table: Table) -> str:
    """The table alone."""
    lines = [table.columns, ("---", *("--:" for _ in table.columns[1:])), *table.rows]
    rows = [line if i == 1 else tuple(text(cell) for cell in line) for i, line in enumerate(lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _line(raw: str) -> str:
    return " ".join(printable(raw).split())


def _section(section: Section) -> str:
    return f"## {text(section.title)}\n\n" + "\n".join(_part(part) for part in section.parts)


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"{text(part)}\n"
    if isinstance(part, Table):
        return table_text(part) + "".join(f"\n{text(note)}\n" for note in part.notes)
    if isinstance(part, Commands):
        # Indented, not fenced: no line of a file can end the block.
        lines = "".join(f"    {_line(line)}\n" for line in part.lines)
        return f"{text(part.title)}:\n\n{lines}"
    return f"![{text(part.alt)}](figures/{part.name}.svg)\n\n{text(part.caption)}\n"
