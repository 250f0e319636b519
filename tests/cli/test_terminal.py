"""Tables and progress bars."""

from __future__ import annotations

import io

import pytest

from moezoo.cli.terminal import Progress, duration, quantity, table
from moezoo.progress import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    assert table(["name", "count"], [("one", 1), ("three", 333)]).splitlines() == [
        "name   count",
        "-----  -----",
        "one        1",
        "three    333",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (1234, "1.23 k"), (2.5e6, "2.5 M"), (3e12, "3 T")]
)
def test_quantities_carry_their_magnitude(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.51, "4.5 s"), (123, "2:03"), (3723, "1:02:03"), (59.99, "1:00")]
)
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_draws_on_a_terminal_from_the_start_and_is_silent_elsewhere() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with Progress(4, "work", stream=stream) as progress:
            begun = stream.getvalue()
            for _ in range(4):
                progress.advance(note="loss 1.0")
    assert "  0%  0 / 4" in begun or not stream.isatty()
    first, last = terminal.getvalue().split("\r")[1], terminal.getvalue().split("\r")[-1]
    assert "  0%  0 / 4" in first and "left" not in first  # nothing is known of it yet
    assert "[" + "#" * 24 + "] 100%" in last and last.endswith("loss 1.0\n")
    assert pipe.getvalue() == ""


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_bar_stays_within_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    line = bar("upcycle", 3e9, 9e9, 60.0, note="loss 1.234  drop 0.1%  12,345 tok/s", unit="B")
    assert len(line) < columns
    assert columns < 80 or "33%  3 GB / 9 GB  left 2:00" in line
