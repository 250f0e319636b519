"""What a second core does while the first one reads and writes: hashing and flushing."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from moezoo.adapters.formats import Source
from moezoo.adapters.tensor_files import TensorFile

_CHUNK = 1 << 18
_WAITING = 32  # chunks that may wait to be hashed
_FLUSH_EVERY = 64 << 20


class FileHashes:
    """sha256 of a source's files, fed by its tensors as they pass in file order.

    Containers that do not show their bytes are read once more at the end. A context manager.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._worker = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._digests: dict[Path, hashlib._Hash] = {}
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

    def update(self, path: Path | None, chunk: memoryview) -> None:
        """Take the next bytes of a file; they are copied."""
        if path not in self._digests:
            return
        self._waiting.append(self._worker.submit(self._digests[path].update, bytes(chunk)))
        if len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def finished(self) -> dict[str, str]:
        """The hash of every file by its name."""
        while self._waiting:
            self._waiting.popleft().result()
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
