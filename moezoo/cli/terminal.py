"""Tables and progress bars for the terminal, on the standard library alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from moezoo.progress import bar, duration, quantity, show, width

__all__ = ["Progress", "complain", "duration", "quantity", "table", "width"]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A text table; columns of numbers are flush right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [all(_numeric(row[i]) for row in cells) and bool(cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(list(header)), rule, *(line(row) for row in cells)])


def complain(text: str) -> None:
    """A line on standard error; where nobody reads that any more, the exit code says enough."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr)


class Progress:
    """A progress bar on standard error from the start on; silent where that is no terminal.

    Args:
        total: what `advance` adds up to. label: stands before the bar. unit: "B" shows bytes.
    """

    def __init__(
        self, total: float, label: str, *, unit: str = "", stream: TextIO | None = None
    ) -> None:
        self.total, self.label, self.unit, self.note = total, label, unit, ""
        self.stream = sys.stderr if stream is None else stream
        self.done, self.started, self.shown = 0.0, time.monotonic(), 0.0

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            self._draw("")
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream.isatty():
            self._draw(self.note)
            self.stream.write("\n")
            self.stream.flush()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Add to what is done; redraws at most ten times a second."""
        self.done += amount
        self.note = note
        now = time.monotonic()
        if now - self.shown >= 0.1:
            self.shown = now
            if self.stream.isatty():  # asks the system, so not at every call
                self._draw(note)

    def _draw(self, note: str) -> None:
        spent = time.monotonic() - self.started
        show(self.stream, bar(self.label, self.done, self.total, spent, note=note, unit=self.unit))


def _numeric(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell[0] in "+-.") or cell in ("", "nan")
