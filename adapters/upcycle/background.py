"""What a second core does while the first one writes: reading ahead, hashing and flushing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from moezoo.adapters.direct import Pages
from moezoo.adapters.formats import Source
from moezoo.adapters.tensor_files import TensorFile
from moezoo.adapters.workers import Workers

_CHUNK = 1 << 18
_FLUSH_EVERY = 32 << 20
# Bytes handed from thread to thread at a time: each time costs as much as hashing 50 kB.
HANDED = 1 << 20
_WAITING = 4  # hand-overs
T = TypeVar("T")
_Hashed = tuple["hashlib._Hash", bytes | memoryview, Pages | None]


def ahead(
    items: Iterator[T],
    waiting: int = _WAITING,
    at_once: int = 4,
    size: Callable[[T], int] = lambda _: 1,
) -> Generator[T, None, None]:
    """Give `items` in order while another thread makes up to `waiting` batches more, each of as
    many as have a `size` of `at_once` together.

    An error of theirs is raised where the item would have come. Close it to stop the thread early.
    """
    batches, worker = _batches(items, at_once, size), Workers(1)
    coming: SimpleQueue[list[T] | None] = SimpleQueue()

    def make() -> None:
        batch = None
        try:
            batch = next(batches, None)
        finally:
            coming.put(batch)

    try:
        for _ in range(waiting):
            worker.submit(make)
        while batch := coming.get():
            worker.submit(make)
            yield from batch
        worker.finish()
    finally:
        worker.stop()


def _batches(
    items: Iterator[T], at_once: int, size: Callable[[T], int]
) -> Generator[list[T], None, None]:
    """Lists of items of the size together; an error comes after what was made before it."""
    batch: list[T] = []
    filled = 0
    try:
        for item in items:
            batch.append(item)
            filled += size(item)
            if filled >= at_once:
                full, batch, filled = batch, [], 0
                yield full
    finally:
        if batch:
            yield batch


class FileHashes:
    """sha256 of a source's files, fed by its tensors as they pass in file order.

    A context manager. Containers that do not show their bytes are read once more at the end.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._worker = Workers(1)  # the reader has enough to do
        self._room = threading.Semaphore(_WAITING)
        self._digests: dict[Path, hashlib._Hash] = {}
        self._chunks: list[_Hashed] = []
        self._size = 0
        if source.kind == "safetensors":
            first: dict[Path, int] = {}
            for info in source.tensors.values():
                if info.path is not None:
                    first[info.path] = min(first.get(info.path, info.offset), info.offset)
            for path, offset in first.items():
                with path.open("rb") as file:
                    self._digests[path] = hashlib.sha256(file.read(offset))

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()

    def update(
        self, path: Path | None, chunk: bytes | memoryview, pages: Pages | None = None
    ) -> None:
        """Take the next bytes of a file; `pages` are held while those in them are needed."""
        if path not in self._digests:
            return
        if pages is not None:
            pages.hold()
        self._chunks.append((self._digests[path], chunk, pages))
        self._size += len(chunk) if pages is None else HANDED  # lent memory is not hoarded
        if self._size >= HANDED:
            self._submit()

    def _submit(self) -> None:
        self._room.acquire()
        self._worker.submit(self._digest, self._chunks)
        self._chunks, self._size = [], 0

    def _digest(self, chunks: list[_Hashed]) -> None:
        try:
            for digest, chunk, pages in chunks:
                digest.update(chunk)
                if pages is not None:
                    pages.release()
        finally:
            self._room.release()

    def finished(self) -> dict[str, str]:
        """The hash of every file by its name."""
        self._submit()
        self._worker.finish()
        hashes: dict[str, str] = {}
        for file in self._source.files:
            digest = self._digests.get(file)
            hashes[file.name] = file_hash(file) if digest is None else digest.hexdigest()
        return hashes


class Flusher:
    """Sends what has been written to the disk early, so that the final fsync finds little to do.

    A context manager; the files must outlive it. An error of the disk is raised in `wrote`.
    """

    def __init__(self) -> None:
        self._worker = Workers(1)
        self._idle = threading.Event()
        self._idle.set()
        self._pending: dict[TensorFile, int] = {}

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._worker.finish()  # an error of the last flush comes here or never
        else:
            self._worker.stop()

    def wrote(self, file: TensorFile, count: int) -> None:
        """Note that `count` bytes of `file` were written."""
        self._pending[file] = self._pending.get(file, 0) + count
        if self._pending[file] < _FLUSH_EVERY or not self._idle.is_set():
            return
        self._worker.check()
        self._pending[file] = 0
        self._idle.clear()
        self._worker.submit(self._flush, file)

    def _flush(self, file: TensorFile) -> None:
        try:
            file.flush()
        finally:
            self._idle.set()


def file_hash(path: Path) -> str:
    """sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
