"""SIGTERM as an exception, so that a long verb cleans up before it leaves."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

TERMINATED = 143


@contextlib.contextmanager
def orderly_termination() -> Iterator[None]:
    """While the block runs, SIGTERM unwinds it (every `finally` runs), then exits with 143."""

    def leave(number: int, frame: FrameType | None) -> None:
        print("moezoo: terminated", file=sys.stderr)
        sys.exit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
