"""A report as one HTML page: nothing is loaded, nothing runs, every text from a file is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from mtrl_imgrad.report.document import Commands, Document, Part, Section
from mtrl_imgrad.report.figures import Drawn
from mtrl_imgrad.report.tables import Table, printable

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #5b6169; --line: #d9dce0; --paper: #ffffff; --tint: #f5f6f8;
  --link: #0b5ea8; --notice: #b35900; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e7e9; --quiet: #a3a9b1; --line: #3a3f46; --paper: #17191c;
  --tint: #20242a; --link: #7db8f0; --notice: #e8a25a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", "Noto Sans",
  "Liberation Sans", Arial, sans-serif; overflow-wrap: break-word; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; font-weight: 650; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); font-weight: 650; }
p { max-width: 46rem; margin: .6rem 0; }
a { color: var(--link); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 0 0 1.2rem; }
dt { color: var(--quiet); }
dd { margin: 0; min-width: 0; }
nav ul { list-style: none; padding: 0; margin: 1.2rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.notice { border-left: 3px solid var(--notice); padding: .1rem 0 .1rem .8rem; }
.wide { overflow-x: auto; margin: 1rem 0 .4rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem 0 .32rem 1.15rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { border-bottom: 1.5px solid var(--quiet); vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 500; min-width: 8rem; }
th.long, td.long { text-align: left; min-width: 15rem; }
td.short { white-space: nowrap; }
.note { color: var(--quiet); font-size: .85rem; margin: .35rem 0; max-width: 54rem; }
figure { margin: 1.4rem 0; }
figure img { display: block; max-width: max(100%, 30rem); height: auto; background: #ffffff; border-radius: 3px; }
figcaption { color: var(--quiet); font-size: .85rem; margin-top: .4rem; max-width: 54rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
pre { background: var(--tint); padding: .7rem .9rem; overflow-x: auto; font-size: .8rem; border-radius: 3px; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; } }
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } nav { display: none; } }
"""
LONG = 28
"""Characters from which a cell may break into lines."""
PIXELS_PER_INCH = 128
"""Of a figure, where the window is wide enough."""


def page(document: Document) -> str:
    """The page, as well-formed XML that is HTML too."""
    facts = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>\n" for name, value in document.facts.items())
    notices = "".join(f'<p class="notice">{text(notice)}</p>\n' for notice in document.notices)
    entries = "".join(f'<li><a href="#{_anchor(s)}">{text(s.title)}</a></li>\n' for s in document.sections)
    sections = "".join(_section(section) for section in document.sections)
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<link rel="icon" href="data:," />
<title>{text(document.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{text(document.title)}</h1>
<dl>
{facts}</dl>
{notices}<nav aria-label="Contents"><ul>
{entries}</ul></nav>
{sections}</main>
</body>
</html>
"""


def text(raw: str) -> str:
    """Any text as HTML: escaped, and without control characters, which no page may contain."""
    return escape(printable(raw))


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z]+", "-", section.title.lower())


def _section(section: Section) -> str:
    parts = "".join(_part(part) for part in section.parts)
    return f'<section id="{_anchor(section)}">\n<h2>{text(section.title)}</h2>\n{parts}</section>\n'


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{text(part)}</p>\n"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Commands):
        return _commands(part)
    return _figure(part)


def _table(table: Table) -> str:
    kinds = ["long" if max(map(len, cells)) >= LONG else "short" for cells in zip(*table.rows, strict=True)]
    head = "".join(
        f'<th scope="col" class="{kind}">{text(c)}</th>' for c, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "".join(f"<tr>{_row(row, kinds)}</tr>\n" for row in table.rows)
    notes = "".join(f'<p class="note">{text(note)}</p>\n' for note in table.notes)
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n'
        f"</table></div>\n{notes}"
    )


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    cells = [f'<td class="{kind}">{_unbroken(cell)}</td>' for cell, kind in zip(row[1:], kinds[1:], strict=True)]
    return f'<th scope="row">{text(row[0])}</th>{"".join(cells)}'


def _unbroken(cell: str) -> str:
    """A cell whose `seed: value` stay together."""
    return text(cell).replace(": ", ":&#160;")


def _commands(commands: Commands) -> str:
    lines = "\n".join(text(line) for line in commands.lines) or "none recorded"
    return f"<details><summary>{text(commands.title)}</summary>\n<pre>{lines}</pre></details>\n"


def _figure(figure: Drawn) -> str:
    data = base64.b64encode(figure.svg).decode()
    width = round(figure.inches * PIXELS_PER_INCH)
    return (
        f'<figure><div class="wide"><img alt="{text(figure.alt)}" width="{width}" '
        f'src="data:image/svg+xml;base64,{data}" /></div>\n'
        f"<figcaption>{text(figure.caption)}</figcaption></figure>\n"
    )
