"""SIGTERM as an exception, so that a long verb cleans up before it leaves."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from moezoo.cli.terminal import complain

TERMINATED = 143


@contextlib.contextmanager
def orderly_termination() -> Iterator[None]:
    """While the block runs, SIGTERM unwinds it (every `finally` runs), then exits with 143.

    Signals belong to the main thread: in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        complain("moezoo: terminated")
        sys.exit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
