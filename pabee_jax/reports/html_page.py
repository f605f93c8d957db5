"""A self-contained HTML page of figures and tables that makes no network request."""

import csv
import dataclasses
import html
import io
import math
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from pabee_jax.io.atomic import write_atomically
from pabee_jax.reports.files import UNENCODABLE, without_nan
from pabee_jax.reports.tables import UNDEFINED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The policy blocks every request, also if a section contains a URL by mistake.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --back: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; padding: 16px; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 1500px; margin: 0 auto; }
h1 { font-size: 1.5rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 0.3rem; }
p { margin: 0.2rem 0 0.6rem; color: var(--soft); font-size: 0.95rem; }
dl { display: flex; flex-wrap: wrap; gap: 10px; margin: 0.8rem 0 1.2rem; }
dl div { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
dt { color: var(--soft); font-size: 0.85rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
main { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px;
  min-width: 0; }
section.wide { grid-column: 1 / -1; }
svg { width: 100%; height: auto; display: block; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
.scroll { overflow: auto; max-height: 420px; margin-bottom: 6px; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: #fff; }
.words { text-align: left; min-width: 8rem; overflow-wrap: anywhere; }
ul { list-style: none; margin: 0; padding: 0; columns: 420px auto; column-gap: 24px; }
li { break-inside: avoid; padding: 6px 0; border-bottom: 1px solid var(--line);
  font-size: 0.95rem; overflow-wrap: anywhere; }
small { color: var(--soft); font-size: 0.82rem; }
a { color: #1f5fa8; font-size: 0.9rem; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A card of the page: a figure with its table, a table alone, or a list of texts.

    Attributes:
        title: the heading, and the file name of the CSV download.
        note: explains how to read the section.
        header: the column names of the table.
        rows: the rows of the table.
        figure: the figure above the table; None for a table alone.
        shown: the header and the rows that the page shows, if they differ from those of the CSV
            download, such as percentages in place of fractions at full precision.
        is_list: whether the page shows the texts in the last column as a list instead of a table.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figure: "Figure | None" = None
    shown: Sequence[Sequence[Any]] | None = None
    is_list: bool = False


def write_page(
    path: Path, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> None:
    """Write the page atomically.

    Args:
        path: the HTML file.
        title: the heading of the page.
        facts: names and values that the page shows below the heading.
        sections: the cards of the page in order.
    """
    fact_items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts
    )
    cards = "".join(map(_card, sections))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><header><h1>{html.escape(title)}</h1><dl>{fact_items}</dl></header>"
        f"<main>{cards}</main></body></html>\n"
    )
    write_atomically(
        path,
        lambda temporary: temporary.write_text(page, encoding="utf-8", errors=UNENCODABLE),
    )


def _card(section: Section) -> str:
    css_class = "wide" if section.figure is None else ""
    if section.is_list:
        body = _list(section.header, section.rows)
    else:
        header, *rows = section.shown or [section.header, *section.rows]
        body = f'<div class="scroll">{_table(header, rows)}</div>'
    if section.figure is not None:
        svg = _svg(section.figure, section.title)
        body = f"{svg}<details><summary>table</summary>{body}</details>"
    name = section.title.lower().replace(" ", "_")
    return (
        f'<section class="{css_class}"><h2>{html.escape(section.title)}</h2>'
        f"<p>{html.escape(section.note)}</p>{body}"
        f'<a download="{name}.csv" href="{_csv(section.header, section.rows)}">CSV</a></section>'
    )


def _list(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a list of the texts in the last column, with the other columns above each text."""
    items = []
    for *values, text in rows:
        details = " · ".join(
            f"{name} {_format(value)}" for name, value in zip(header, values, strict=False)
        )
        items.append(f"<li><small>{html.escape(details)}</small><br>{html.escape(text)}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    is_text = [any(isinstance(row[column], str) for row in rows) for column in range(len(header))]
    lines = [f"<tr>{''.join(map(_cell, ['th'] * len(header), header, is_text))}</tr>"]
    for row in rows:
        lines.append(f"<tr>{''.join(map(_cell, ['td'] * len(row), row, is_text))}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cell(tag: str, value: Any, is_text: bool) -> str:
    attribute = ' class="words"' if is_text else ""
    return f"<{tag}{attribute}>{html.escape(_format(value))}</{tag}>"


def _format(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return UNDEFINED
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *(map(without_nan, row) for row in rows)])
    return "data:text/csv;charset=utf-8," + urllib.parse.quote(text.getvalue(), errors=UNENCODABLE)


def _svg(figure: "Figure", title: str) -> str:
    text = io.StringIO()
    # With fonttype "none" the SVG holds text, not paths: browsers can search it, screen readers can
    # read it, and it takes the font of the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    label = html.escape(title, quote=True)
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
