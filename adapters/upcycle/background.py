"""What a second core does while the first one writes: reading ahead, hashing and flushing."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from moezoo.adapters.formats import Source
from moezoo.adapters.tensor_files import TensorFile

_CHUNK = 1 << 18
_FLUSH_EVERY = 32 << 20
_AT_ONCE = 4  # chunks handed from thread to thread: each time costs as much as hashing 50 kB
_WAITING = 4  # hand-overs
T = TypeVar("T")


def ahead(
    items: Iterator[T], waiting: int = _WAITING, at_once: int = _AT_ONCE
) -> Generator[T, None, None]:
    """Give `items` in order while another thread makes up to `waiting` times `at_once` more.

    An error of theirs is raised where the item would have come. Close it to stop the thread early.
    """
    end: list[T] = []
    batches, worker = _batches(items, at_once), ThreadPoolExecutor(1)
    try:
        coming = deque(worker.submit(next, batches, end) for _ in range(waiting))
        while batch := coming.popleft().result():
            coming.append(worker.submit(next, batches, end))
            yield from batch
    finally:
        worker.shutdown(cancel_futures=True)


def _batches(items: Iterator[T], size: int) -> Generator[list[T], None, None]:
    """Lists of `size` items; an error comes after what was made before it."""
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                full, batch = batch, []
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
        self._worker = ThreadPoolExecutor(1)  # the reader has enough to do
        self._coming: deque[Future[None]] = deque()
        self._digests: dict[Path, hashlib._Hash] = {}
        self._chunks: list[tuple[hashlib._Hash, bytes | memoryview]] = []
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
        self._worker.shutdown(cancel_futures=True)

    def update(self, path: Path | None, chunk: bytes | memoryview) -> None:
        """Take the next bytes of a file."""
        if path not in self._digests:
            return
        self._chunks.append((self._digests[path], chunk))
        if len(self._chunks) == _AT_ONCE:
            self._submit()

    def _submit(self) -> None:
        self._coming.append(self._worker.submit(_digest, self._chunks))
        self._chunks = []
        if len(self._coming) > _WAITING:
            self._coming.popleft().result()

    def finished(self) -> dict[str, str]:
        """The hash of every file by its name."""
        self._submit()
        while self._coming:
            self._coming.popleft().result()
        hashes: dict[str, str] = {}
        for file in self._source.files:
            digest = self._digests.get(file)
            hashes[file.name] = file_hash(file) if digest is None else digest.hexdigest()
        return hashes


def _digest(chunks: list[tuple[hashlib._Hash, bytes | memoryview]]) -> None:
    for digest, chunk in chunks:
        digest.update(chunk)


class Flusher:
    """Sends what has been written to the disk early, so that the final fsync finds little to do.

    A context manager; the files must outlive it. An error of the disk is raised in `wrote`.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._pending: dict[TensorFile, int] = {}

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def wrote(self, file: TensorFile, count: int) -> None:
        """Note that `count` bytes of `file` were written."""
        self._pending[file] = self._pending.get(file, 0) + count
        if self._pending[file] < _FLUSH_EVERY:
            return
        if self._running is not None:
            if not self._running.done():
                return
            self._running.result()
        self._pending[file] = 0
        self._running = self._worker.submit(file.flush)


def file_hash(path: Path) -> str:
    """sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
