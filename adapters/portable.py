"""Calls on files that not every system has, and what stands in for them. No torch here.

Linux has them all; macOS has no `fdatasync`; Windows neither positional reads and writes nor
`flock`, opens no directory, and translates line ends unless it is told not to.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BINARY = getattr(os, "O_BINARY", 0)
_seeking = threading.Lock()


def open_binary(path: Path, flags: int) -> int:
    """A descriptor, which no other program inherits; a file that is created has the usual mode."""
    return os.open(path, flags | _BINARY, 0o666)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read into a buffer from `offset` on; how many bytes there were, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    if hasattr(os, "pread"):
        content = os.pread(descriptor, len(buffer), offset)
    else:
        with _at(descriptor, offset):
            content = os.read(descriptor, len(buffer))
    buffer[: len(content)] = content
    return len(content)


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> int:
    """Write from `offset` on; how many bytes were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, offset)
    with _at(descriptor, offset):
        return os.write(descriptor, content)


def flush_data(descriptor: int) -> None:
    """Send what a file holds to the disk, and of what describes it no more than that needs."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def flush(path: Path) -> None:
    """fsync a file, or a directory where the system opens one."""
    if fcntl is None and path.is_dir():
        return
    # Windows flushes only what is open for writing; elsewhere a file may be read-only.
    descriptor = open_binary(path, os.O_RDWR if fcntl is None else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Hold a lock on a file or directory while the block runs; gives False if another has it, None
    where the system has no such locks.
    """
    if fcntl is None:
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def is_read_only(path: Path) -> bool:
    """Whether a file system that holds the path says that it takes no writes."""
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def c_function(name: str, *types: type) -> Callable[..., int] | None:
    """A function of the C library that returns 0 or sets errno; None where there is none."""
    library = None if fcntl is None else ctypes.CDLL(None, use_errno=True)
    call = getattr(library, name, None)
    if call is None:
        return None
    call.argtypes, call.restype = types, ctypes.c_int
    found: Callable[..., int] = call
    return found


@contextlib.contextmanager
def _at(descriptor: int, offset: int) -> Iterator[None]:
    """A file's own position is one for all threads: one of them at a time moves it."""
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        yield
