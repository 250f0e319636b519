"""Descriptors of many files, of which only a few are open at a time. No torch here.

A system lets a process open a thousand files or fewer; a checkpoint may have more shards.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moezoo.adapters.portable import open_binary

_MOST = 64  # many more than there are threads, each of which uses two at a time


@dataclass
class _Open:
    descriptor: int
    users: int = 0
    leaving: bool = False


class OpenFiles:
    """Opens a file when it is used, and closes the one that was used longest ago for it.

    Threads may share it. A file must not be replaced by another while it is in use here.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most, self._lock = most, threading.Lock()
        self._open: dict[tuple[Path, int], _Open] = {}  # the one used longest ago comes first

    @contextlib.contextmanager
    def use(self, path: Path, flags: int) -> Iterator[int]:
        """A descriptor of the file, opened with `flags`, while the block runs. Raises OSError."""
        with self._lock:
            used = self._open.pop((path, flags), None)
            if used is None:
                self._make_room()
                used = _Open(open_binary(path, flags))
            self._open[path, flags] = used
            used.users += 1
        try:
            yield used.descriptor
        finally:
            with self._lock:
                used.users -= 1
                self._close_unused(used)

    def close(self, path: Path | None = None) -> None:
        """Close a file, or all: at once, or when its last user is done."""
        with self._lock:
            for key in [key for key in self._open if path is None or key[0] == path]:
                used = self._open.pop(key)
                used.leaving = True
                self._close_unused(used)

    def _make_room(self) -> None:
        idle = [key for key, used in self._open.items() if not used.users]
        for key in idle[: max(len(self._open) - self._most + 1, 0)]:
            os.close(self._open.pop(key).descriptor)

    @staticmethod
    def _close_unused(used: _Open) -> None:
        if used.leaving and not used.users:
            os.close(used.descriptor)
