"""Flax's MessagePack container, as transformers' Flax models are stored (`flax_model.msgpack`)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moezoo.adapters.formats.files import quoted, regular_file
from moezoo.adapters.formats.index import check_shard, read_index
from moezoo.adapters.formats.msgpack import Extension, Malformed, unpack
from moezoo.adapters.formats.stored import Array, StoredSource
from moezoo.errors import CorruptFile

NDARRAY = 1  # Flax's extension for arrays
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint32": "U32",
    "uint8": "U8",
    "bool": "BOOL",
}
_CHUNKED = "__msgpack_chunked_array__"


class FlaxSource(StoredSource):
    """One `flax_model.msgpack`, or a sharded one named by its `*.index.json`.

    The names are the PyTorch model's, kernels transposed.
    """

    kind = "flax"

    def __init__(self, path: Path, *, file: Path | None = None, index: Path | None = None) -> None:
        shards = {} if index is None else read_index(index)
        single = path if file is None else file
        files = (single,) if index is None else tuple(index.parent / n for n in sorted(shards))
        super().__init__(path, files)
        for shard in files:
            found = list(arrays(read_msgpack(shard), shard))
            if index is not None:
                check_shard(index, shard, shards[shard.name], {"/".join(k) for k, _ in found})
            self._add(found)

    def _add(self, found: list[tuple[tuple[str, ...], Array]]) -> None:
        for keys, array in found:
            name = ".".join(keys)
            kernel = name.endswith(".kernel")
            for ending in (".kernel", ".embedding"):
                name = name.removesuffix(ending) + (".weight" if name.endswith(ending) else "")
            self.add(name, array, transposed=kernel)


def read_msgpack(path: Path) -> dict[str, Any]:
    """The map in a MessagePack file; its binary parts are views of the mapped file."""
    if regular_file(path) == 0:
        raise CorruptFile("the file is empty", path=path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
    try:
        values = unpack(content)
    except Malformed as error:
        raise CorruptFile(f"not readable MessagePack: {error}", path=path) from None
    if not isinstance(values, dict):
        raise CorruptFile("not a map of arrays", path=path, found=type(values).__name__)
    return values


def arrays(
    values: Any, path: Path, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Array]]:
    """Every array in nested maps with the keys that lead to it."""
    if isinstance(values, dict) and _CHUNKED not in values:
        for key, value in values.items():
            yield from arrays(value, path, (*keys, str(key)))
    elif isinstance(values, dict):
        yield keys, _joined(values, path, keys)
    elif isinstance(values, Extension) and values.kind == NDARRAY:
        yield keys, _array(values, path, keys)


def _array(value: Extension, path: Path, keys: tuple[str, ...]) -> Array:
    name = quoted("/".join(keys))
    try:
        parts = unpack(value.content)
    except Malformed as error:
        raise CorruptFile(f"the array {name} is malformed: {error}", path=path) from None
    if not isinstance(parts, list) or len(parts) != 3:
        raise CorruptFile(f"the array {name} is malformed", path=path)
    shape, dtype, content = parts
    whole = isinstance(shape, list) and all(isinstance(n, int) and 0 <= n < 2**40 for n in shape)
    known = isinstance(dtype, str) and dtype in DTYPES
    if not whole or not known or not isinstance(content, memoryview):
        raise CorruptFile(
            f"the array {name} is malformed", path=path, found=quoted(dtype) if whole else "shape"
        )
    return Array(DTYPES[dtype], tuple(shape), lambda: content)


def _joined(values: dict[str, Any], path: Path, keys: tuple[str, ...]) -> Array:
    """An array that was too large for one value: a flat list of pieces."""
    name = quoted("/".join(keys))
    shape, pieces = values.get("shape"), values.get("chunks")
    if not isinstance(shape, dict) or not isinstance(pieces, dict) or not pieces:
        raise CorruptFile(f"the array {name} is malformed", path=path)
    sizes = tuple(shape[key] for key in sorted(shape, key=int))
    parts = [pieces[key] for key in sorted(pieces, key=int)]
    if not all(isinstance(part, Extension) for part in parts):
        raise CorruptFile(f"the array {name} is malformed", path=path)
    made = [_array(part, path, keys) for part in parts]
    return Array(made[0].dtype, sizes, lambda: b"".join(part.read() for part in made))
