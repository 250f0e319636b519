"""A self-contained HTML page: one file, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from moezoo.errors import SaveError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #25303b; max-width: 62rem; margin: 3rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.lead { color: #55616e; margin-top: 0; } img { width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: right; border-bottom: 1px solid #e8ebef; }
th.words, td.words { text-align: left; }
.strip { display: flex; height: 1.6rem; margin: .6rem 0; border: 1px solid #e8ebef; }
.strip span { flex: 1; }
pre { background: #f5f6f8; padding: .8rem 1rem; white-space: pre-wrap; border-radius: 4px; }
"""


def write_page(
    path: Path,
    *,
    title: str,
    lead: str,
    notes: Sequence[str] = (),
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    commands: Sequence[str] = (),
    picture: Path | None = None,
    sections: Sequence[str] = (),
) -> Path:
    """Write a page with a table, the commands that were run, and a picture inside it.

    Args:
        lead: a sentence under the title. notes: a list under it.
        sections: HTML that comes after the table.

    Raises SaveError when it cannot be written.
    """
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>']
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">')
    parts += ["<h2>Numbers</h2>", html_table(header, rows)]
    parts += sections
    if commands:
        shown = "\n".join(f"$ {command}" for command in commands)
        parts += ["<h2>Commands</h2>", f"<pre>{escape(shown)}</pre>"]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    html = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
    try:
        path.write_text(html + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"the page was not written: {error.strerror}", path=path) from None
    return path


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)
) -> str:
    """A table whose cells are text; the columns `words` are flush left, the others right."""
    lines = [_row("th", header, words), *(_row("td", row, words) for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _row(tag: str, cells: Sequence[str], words: Sequence[int]) -> str:
    kinds = (' class="words"' if column in words else "" for column in range(len(cells)))
    inside = (
        f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
    )
    return "<tr>" + "".join(inside) + "</tr>"
