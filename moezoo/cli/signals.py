"""SIGTERM as an exception, so that a long verb cleans up before it leaves; and an end where the
exception cannot come, because Python's handlers run between two of its own instructions alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from moezoo.cli.terminal import complain

TERMINATED = 143
_CODES = {int(signal.SIGTERM): TERMINATED, int(signal.SIGINT): 130}
_LOOK = 0.1  # seconds


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


@contextlib.contextmanager
def ending_where_deaf(seconds: float, who: str) -> Iterator[None]:
    """While the block runs, SIGTERM or SIGINT ends the process, with a line and the exit code, if
    the main thread has not moved so long after it: it waits in a library, as for a rank that does
    not come. Where it moves, Python's own handler has run.

    Signals belong to the main thread: in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    over = threading.Event()
    thread = threading.Thread(target=_listen, args=(reader, over, seconds, who), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        with contextlib.suppress(BlockingIOError):  # it is full: the thread has what to read
            os.write(writer, b"\0")
        thread.join()
        os.close(writer)
        os.close(reader)


def _listen(reader: int, over: threading.Event, seconds: float, who: str) -> None:
    while not over.is_set():
        numbers = os.read(reader, 16)
        code = next((_CODES[number] for number in numbers if number in _CODES), None)
        place, until = _place(), time.monotonic() + seconds
        while code is not None and _place() == place and not over.wait(_LOOK):
            if time.monotonic() > until:
                word = "terminated" if code == TERMINATED else "interrupted"
                complain(f"moezoo: {who}: {word} in a wait; what was saved is whole")
                os._exit(code)


def _place() -> tuple[int, int]:
    """Where the main thread is: its innermost frame of Python, and the instruction."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return id(frame), frame.f_lasti
