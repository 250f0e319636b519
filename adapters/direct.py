"""Writing past the system's cache: whole pages go from memory to the disk without a copy between.

What a conversion writes is many times what a cache should hold, and has to be on the disk at the
end; copying it into the cache first costs more processor time than all else. File systems without
direct writes (and `MOEZOO_DIRECT_IO=0`) get ordinary ones. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from moezoo.adapters.portable import c_function, write_at
from moezoo.adapters.workers import Workers

PAGE = 4096  # what positions, lengths and addresses of direct writes are multiples of
LARGEST = 2 << 20  # bytes of one write; smaller ones wait more for the disk and the interpreter
_AT_ONCE = 4  # writes under way: each waits for the disk, then for its turn in the interpreter
_BUFFERS = 4
LENT = 1 << 20  # bytes of memory that is lent at a time
_LENT_AT_ONCE = 8
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def direct_flags(path: Path) -> int | None:
    """Flags that open an existing file for writes past the cache; None where there are none."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or os.environ.get("MOEZOO_DIRECT_IO", "1") == "0":
        return None
    flags: int = os.O_WRONLY | flag
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return flags


def allocate(descriptor: int, size: int) -> None:
    """Reserve the blocks of a file, where the file system can: writes are faster, and a disk that
    is too full says so before anything is written.

    Raises OSError when it is (`os.posix_fallocate` would write every block of a file system that
    cannot reserve).
    """
    call = _fallocate()
    if call is None or size == 0 or call(descriptor, 0, 0, size) == 0:
        return
    code = ctypes.get_errno()
    if code not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code))


Descriptor = Callable[[], contextlib.AbstractContextManager[int]]


class DirectFile:
    """A file to which whole pages are written directly and the rest through the cache.

    Parts of a page that were written apart from each other both go through the cache, so that none
    undoes the other.

    Args:
        cached, direct: give a descriptor for as long as it is used.
    """

    def __init__(self, cached: Descriptor, direct: Descriptor) -> None:
        self._cached, self._direct = cached, direct

    def write(self, content: memoryview, position: int) -> None:
        """Write `content`, whose address and `position` have the same remainder by PAGE."""
        head = min(-position % PAGE, len(content))
        body = (len(content) - head) // PAGE * PAGE
        done = head + self._pages(content[head : head + body], position + head)
        if not head and done == len(content):
            return
        with self._cached() as descriptor:
            for part, place in ((content[:head], position), (content[done:], position + done)):
                write_all(descriptor, part, place)

    def _pages(self, content: memoryview, position: int) -> int:
        """How many bytes went directly: all but those after a refusal or a short write."""
        done = 0
        with self._direct() as descriptor:
            while done < len(content):
                try:
                    count = write_at(descriptor, content[done:], position + done)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        raise
                    break
                done += count
                if count % PAGE:
                    break
        return done


Places = Sequence[tuple[DirectFile, int]]


class Pages:
    """LENT bytes of memory that begin on a page, lent until the last of its holders lets go."""

    def __init__(self, home: SimpleQueue[Pages | None]) -> None:
        self.memory = mmap.mmap(-1, LENT)
        self._home, self._holders, self._lock = home, 0, threading.Lock()

    def hold(self, times: int = 1) -> None:
        """One holder more, or some."""
        with self._lock:
            self._holders += times

    def release(self) -> None:
        """One holder less; memory that nobody holds is lent again."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
        self._home.put(self)


class DirectWriter:
    """Writes stretches of files directly, some of them at once, from buffers of its own.

    Stretches that continue one another are gathered; who can fill whole pages fills those that
    `lend` gives, and nothing is copied. A context manager; an error of the disk is raised by a
    later write or by `finish`.
    """

    def __init__(self) -> None:
        self._workers = Workers(_AT_ONCE)
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(mmap.mmap(-1, LARGEST + PAGE)))
        # Apart from the others: who lends may be far ahead of who writes, who must not wait for it.
        self._to_lend: SimpleQueue[Pages | None] = SimpleQueue()
        for _ in range(_LENT_AT_ONCE):
            self._to_lend.put(Pages(self._to_lend))
        self._gathered: _Stretch | None = None

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.stop()

    @contextlib.contextmanager
    def lending(self) -> Iterator[None]:
        """After the block, `lend` raises RuntimeError, so that no thread waits there for good."""
        try:
            yield
        finally:
            self._to_lend.put(None)

    def lend(self) -> Pages:
        """Memory to fill and to pass to `write_pages`, held once; waits until there is some."""
        pages = self._to_lend.get()
        if pages is None:
            self._to_lend.put(None)
            raise RuntimeError("nobody writes any more")
        pages.hold()
        return pages

    def write_pages(self, places: Places, pages: Pages, size: int) -> None:
        """Write the first `size` bytes of lent memory to every (file, position), all of them
        multiples of PAGE, and let go of it.
        """
        self._workers.check()
        pages.hold(len(places))
        for file, position in places:
            self._workers.submit(_write_pages, file, position, pages, size)
        pages.release()

    def write(self, places: Places, content: bytes | memoryview) -> None:
        """Write `content` to every (file, position). It may change as soon as this returns."""
        shifts: dict[int, list[tuple[DirectFile, int]]] = {}
        for file, position in places:
            shifts.setdefault(position % PAGE, []).append((file, position))
        for shift, alike in shifts.items():
            self._gather(shift, alike, memoryview(content))

    def finish(self) -> None:
        """Wait until everything is written."""
        self._send()
        self._workers.finish()

    def _gather(self, shift: int, places: Places, content: memoryview) -> None:
        """Write to places whose positions have the same remainder by PAGE."""
        while content:
            stretch = self._gathered
            if stretch is None or stretch.size == LARGEST or stretch.ends() != places:
                self._send()
                stretch = self._gathered = _Stretch(self._free.get(), shift, places)
            size = min(len(content), LARGEST - stretch.size)
            stretch.add(content[:size])
            content, places = content[size:], [(file, at + size) for file, at in places]

    def _send(self) -> None:
        self._workers.check()
        if self._gathered is not None:
            self._workers.submit(self._write, self._gathered)
            self._gathered = None

    def _write(self, stretch: _Stretch) -> None:
        try:
            content = stretch.buffer[stretch.shift : stretch.shift + stretch.size]
            for file, position in stretch.places:
                file.write(content, position)
        finally:
            self._free.put(stretch.buffer)


def _write_pages(file: DirectFile, position: int, pages: Pages, size: int) -> None:
    try:
        file.write(memoryview(pages.memory)[:size], position)
    finally:
        pages.release()


@dataclass
class _Stretch:
    """Bytes for some places; `shift` is the remainder by PAGE of all their positions."""

    buffer: memoryview
    shift: int
    places: Places
    size: int = 0

    def add(self, content: memoryview) -> None:
        start = self.shift + self.size
        self.buffer[start : start + len(content)] = content
        self.size += len(content)

    def ends(self) -> Places:
        return [(file, position + self.size) for file, position in self.places]


def write_all(descriptor: int, content: bytes | memoryview, position: int) -> None:
    """Write all of `content` at `position`, through the cache."""
    rest = memoryview(content)
    while rest:
        count = write_at(descriptor, rest, position)
        rest, position = rest[count:], position + count


@functools.cache
def _fallocate() -> Callable[..., int] | None:
    return c_function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
