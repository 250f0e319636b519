"""Tables and progress bars for the terminal, on the standard library alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import TextIO


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


def quantity(value: float) -> str:
    """1234567 as "1.23 M"; below a thousand unchanged."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {suffix}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """Seconds as "1:02:03", "2:03" or "4.5 s"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def complain(text: str) -> None:
    """A line on standard error; where nobody reads that any more, the exit code says enough."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr)


class Progress:
    """A progress bar on standard error; silent where that is no terminal.

    Args:
        total: what `advance` adds up to. label: stands before the bar. unit: "B" shows bytes.
    """

    def __init__(
        self, total: float, label: str, *, unit: str = "", stream: TextIO | None = None
    ) -> None:
        self.total, self.label, self.unit = max(total, 1e-9), label, unit
        self.stream = sys.stderr if stream is None else stream
        self.done, self.started, self.shown = 0.0, time.monotonic(), 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream.isatty():
            self._draw("")
            self.stream.write("\n")
            self.stream.flush()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Add to what is done; redraws at most ten times a second."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown >= 0.1:
            self.shown = now
            if self.stream.isatty():  # asks the system, so not at every call
                self._draw(note)

    def _draw(self, note: str) -> None:
        share = min(self.done / self.total, 1.0)
        elapsed = time.monotonic() - self.started
        left = elapsed / share - elapsed if share > 0.01 else 0.0
        bar = "#" * round(28 * share)
        amounts = f"{quantity(self.done)}{self.unit} / {quantity(self.total)}{self.unit}"
        text = f"{self.label} [{bar:<28}] {share:4.0%}  {amounts}  left {duration(left)}  {note}"
        self.stream.write(f"\r\x1b[K{text[:118]}")
        self.stream.flush()


def _numeric(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell[0] in "+-.") or cell in ("", "nan")
