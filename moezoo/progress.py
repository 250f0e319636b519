"""The line that shows how far a long job is, the same for every one; no torch here."""

from __future__ import annotations

import shutil
from typing import TextIO

_BAR = 24


def bar(
    label: str, done: float, total: float, seconds: float, *, note: str = "", unit: str = ""
) -> str:
    """Such as "train [####        ]  30%  300 / 1 k  left 2:03  loss 3.1", as wide as the terminal.

    Args:
        seconds: spent on what is done; the time that is left is told once something is. unit: "B"
            shows bytes.
    """
    share = min(done / total, 1.0) if total > 0 else 1.0
    filled = "#" * round(_BAR * share)
    left = f"left {duration(seconds / share - seconds)}" if share > 0 else ""
    amounts = f"{quantity(done)}{unit} / {quantity(total)}{unit}"
    parts = (f"{label.strip():<9} [{filled:<{_BAR}}] {share:4.0%}", amounts, left, note)
    return "  ".join(part for part in parts if part)[: max(width() - 1, 20)]


def show(stream: TextIO, line: str) -> None:
    """Put a line in the place of the one that is there."""
    stream.write(f"\r\x1b[K{line}")
    stream.flush()


def width() -> int:
    """Columns of the terminal, 80 where nobody says."""
    return shutil.get_terminal_size().columns


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
