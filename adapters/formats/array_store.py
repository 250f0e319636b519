"""The arrays of an orbax checkpoint: zarr 2 or 3, all in one OCDBT database or each in a folder.

tensorstore reads them (extra `orbax`). It ends the process when it cannot allocate what metadata
claims, so every claim is judged before tensorstore sees it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moezoo.adapters.formats.base import DTYPE_BITS
from moezoo.adapters.formats.files import parse_json, plain_name, quoted, read_json
from moezoo.adapters.formats.stored import Array
from moezoo.adapters.formats.zarr_layout import Layout, zarr2_layout, zarr3_layout
from moezoo.errors import CheckpointError, CorruptFile, MoezooError, how_to_install

DATABASE = "manifest.ocdbt"
PARTS = "ocdbt.process_"  # folders of what each process wrote of a database
_ZARR2, _ZARR3 = ".zarray", "zarr.json"
_DRIVERS = {_ZARR2: "zarr", _ZARR3: "zarr3"}
_DOWNLOAD = "Download the whole checkpoint."
_COMPRESSORS = ("zstd", "gzip", "zlib")
_MAX_METADATA = 1 << 20
_EXPANSION = 1 << 16  # zstd packs zeros by 2^15: no array is larger than that times its files
_NODES = 16 << 20  # bytes of the database's tree that stay in memory
_PROBLEMS = (ValueError, LookupError, OSError, RuntimeError)  # what tensorstore raises


class ArrayStore:
    """The arrays below the folder of an orbax item. Raises CheckpointError without tensorstore."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = os.path.realpath(folder)  # the file driver refuses `..`
        self.packed = (self.folder / DATABASE).exists()
        if not self.packed and any(self.folder.glob(f"{PARTS}*")):
            raise CheckpointError("it is missing", path=self.folder / DATABASE, hint=_DOWNLOAD)
        self._tensorstore = _tensorstore(folder)
        self._database: Any = None
        self._context: Any = None
        self._stored = -1
        self._stacks: Counter[str] = Counter()
        self._last: tuple[str, Any] = ("", None)

    def array(self, name: str) -> Array:
        """The array called `name`; its chunks are read when its bytes are wanted.

        Raises CorruptFile for malformed metadata, CheckpointError for an array that is missing or
        packed in a way that orbax never does.
        """
        plain_name(name, self.folder)
        file, meta = self._metadata(name)
        path = self.folder / name / file
        if file == _ZARR2:
            layout = zarr2_layout(meta, path, _COMPRESSORS)
        else:
            layout = zarr3_layout(meta, path)
        if len(layout.shape) == 3:
            layer = name.rsplit(".", 2)[0]
            self._stacks[layer] += _nbytes(layout.dtype, layout.chunks)
        read = partial(self._read, name, _DRIVERS[file], layout)
        return Array(layout.dtype, layout.shape, read, read if layout.shape else None)

    def close(self) -> None:
        """Let go of the files and of what was kept of them."""
        self._database, self._context, self._last = None, None, ("", None)

    def _metadata(self, name: str) -> tuple[str, dict[str, Any]]:
        for file in _DRIVERS:
            path = self.folder / name / file
            if self.packed:
                content = self._value(f"{name}/{file}")
                if content is not None:
                    return file, parse_json(content, path, CorruptFile)
            elif _exists(path):
                return file, read_json(path, most=_MAX_METADATA)
        raise CheckpointError(
            f"the array {quoted(name)} is missing",
            path=self.folder / (DATABASE if self.packed else name),
            key=name,
            hint=_DOWNLOAD,
        )

    def _value(self, key: str) -> bytes | None:
        """A value of the database, or None when it has no such key."""
        path = self.folder / DATABASE
        with self._told(path, key):
            if self._database is None:
                context = self._tensorstore.Context({"cache_pool": {"total_bytes_limit": _NODES}})
                place = self._place("")
                self._database = self._tensorstore.KvStore.open(place, context=context).result()
            found = self._database.read(key).result()
        if found.state != "value":
            return None
        content = bytes(found.value)
        if not content or len(content) > _MAX_METADATA:  # what lay in a lost file reads as empty
            reason = "too large" if content else "lost, with the file that held it"
            hint = None if content else _DOWNLOAD
            raise CorruptFile(f"{quoted(key)} is {reason}", path=path, key=key, hint=hint)
        return content

    def _read(self, name: str, driver: str, layout: Layout, index: int | None = None) -> memoryview:
        """The array's bytes, or those of one entry of its first axis."""
        path = self.folder / (DATABASE if self.packed else name)
        self._check_claim(layout, path, name)
        shape = layout.shape if index is None else layout.shape[1:]
        content = bytearray(_nbytes(layout.dtype, shape))  # a MemoryError, should it be one
        if not content:
            return memoryview(content)
        with self._told(path, name):
            array = self._opened(name, driver)
            if tuple(array.shape) != layout.shape:
                raise CorruptFile("its metadata changed meanwhile", path=path, key=name)
            import numpy

            whole = numpy.frombuffer(content, dtype=array.dtype.numpy_dtype).reshape(shape)
            part = array if index is None else array[index]
            self._tensorstore.array(whole, copy=False, write=True).write(part).result()
        return memoryview(content)

    def _opened(self, name: str, driver: str) -> Any:
        last, array = self._last
        if last == name:
            return array
        if self._context is None:
            # Experts are read in turn, a matrix of each: without its chunks in memory, all of them
            # would be unpacked anew for every expert.
            kept = _NODES + max(self._stacks.values(), default=0)
            self._context = self._tensorstore.Context({"cache_pool": {"total_bytes_limit": kept}})
        spec = {
            "driver": driver,
            "kvstore": self._place(f"{name}/"),
            "fill_missing_data_reads": False,  # a missing chunk is no zeros
            "recheck_cached_data": False,
        }
        array = self._tensorstore.open(spec, open=True, read=True, context=self._context).result()
        self._last = name, array
        return array

    def _place(self, path: str) -> dict[str, Any]:
        """Where tensorstore finds the keys that begin with `path`."""
        if not self.packed:
            return {"driver": "file", "path": f"{self._real}/{path}"}
        base = {"driver": "file", "path": f"{self._real}/"}
        return {"driver": "ocdbt", "base": base, "path": path}

    def _check_claim(self, layout: Layout, path: Path, name: str) -> None:
        """Raise CorruptFile when no files of this size can hold the array."""
        if self._stored < 0:
            files = (file for file in self.folder.rglob("*") if file.is_file())
            self._stored = sum(file.stat().st_size for file in files)
        claimed = max(_nbytes(layout.dtype, shape) for shape in (layout.shape, layout.chunks))
        if claimed > self._stored * _EXPANSION:
            raise CorruptFile(
                f"the array {quoted(name)} claims more than its files can hold",
                path=path,
                key=name,
                found=f"{claimed} bytes of {self._stored}",
            )

    @contextmanager
    def _told(self, path: Path, name: str) -> Iterator[None]:
        """Raise what tensorstore finds wrong as CorruptFile."""
        try:
            yield
        except MoezooError:
            raise
        except _PROBLEMS as error:
            reason = str(error).partition(" [tensorstore_spec")[0].partition(" [source")[0]
            for start in (f"{self._real}/", f"{name}/"):
                reason = reason.replace(start, "")
            reason = reason.rpartition(": ")[2]
            lost = str(error).startswith(("NOT_FOUND", "OUT_OF_RANGE"))
            raise CorruptFile(
                f"{quoted(name)} cannot be read: {quoted(reason)}",
                path=path,
                key=name,
                hint=_DOWNLOAD if lost else None,
            ) from None


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name of more than 255 bytes
        return False


def _tensorstore(folder: Path) -> Any:
    try:
        import tensorstore
    except ImportError:
        raise CheckpointError(
            "an orbax checkpoint is read by tensorstore, which is not installed",
            path=folder,
            hint=how_to_install("orbax"),
        ) from None
    return tensorstore
