"""Flax's MessagePack container, as transformers' Flax models are stored (`flax_model.msgpack`)."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moezoo.adapters.formats.base import DTYPE_BITS
from moezoo.adapters.formats.files import opened, quoted, regular_file
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
CHUNKED = "__msgpack_chunked_array__"
_MAX_CHUNKS = 4096


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
            add_flax(self, ((".".join(keys), array) for keys, array in found))


def add_flax(source: StoredSource, found: Iterable[tuple[str, Array]]) -> None:
    """Offer arrays by the names of the PyTorch model, kernels transposed."""
    for name, array in found:
        kernel = name.endswith(".kernel")
        for ending in (".kernel", ".embedding"):
            name = name.removesuffix(ending) + (".weight" if name.endswith(ending) else "")
        source.add(name, array, transposed=kernel)


def read_msgpack(path: Path) -> dict[str, Any]:
    """The map in a MessagePack file; its binary parts are views of the mapped file."""
    if regular_file(path) == 0:
        raise CorruptFile("the file is empty", path=path)
    with opened(path) as file:
        # The map is let go of with the last array that points into it.
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
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
    if isinstance(values, dict) and CHUNKED not in values:
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
    known = isinstance(dtype, str) and dtype in DTYPES
    if not known or not isinstance(content, memoryview) or not _is_shape(shape):
        found = quoted(dtype) if not known else "its shape or content"
        raise CorruptFile(f"the array {name} is malformed", path=path, found=found)
    _check_size(shape, DTYPES[dtype], len(content), path, name)
    return Array(DTYPES[dtype], tuple(shape), lambda: content)


def _joined(values: dict[str, Any], path: Path, keys: tuple[str, ...]) -> Array:
    """An array that was too large for one value: a flat list of pieces."""
    name = quoted("/".join(keys))
    sizes, parts = _in_order(values.get("shape")), _in_order(values.get("chunks"))
    if not parts or not sizes or not _is_shape(sizes):
        raise CorruptFile(f"the chunked array {name} is malformed", path=path)
    if not all(isinstance(part, Extension) and part.kind == NDARRAY for part in parts):
        raise CorruptFile(f"a chunk of the array {name} is no array", path=path)
    made = [_array(part, path, keys) for part in parts]
    dtype = made[0].dtype
    if any(array.dtype != dtype for array in made):
        raise CorruptFile(f"the chunks of the array {name} differ in dtype", path=path)
    _check_size(sizes, dtype, sum(len(array.read()) for array in made), path, name)
    return Array(dtype, tuple(sizes), lambda: b"".join(array.read() for array in made))


def _in_order(values: Any) -> list[Any]:
    """What Flax makes of a list: a map from "0", "1", ...; anything else is an empty list."""
    if not isinstance(values, Mapping) or len(values) > _MAX_CHUNKS:
        return []
    keys = [str(index) for index in range(len(values))]
    return [values[key] for key in keys] if all(key in values for key in keys) else []


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= 16
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**40 for n in shape)
    )


def _check_size(shape: list[int], dtype: str, found: int, path: Path, name: str) -> None:
    """Raise CorruptFile unless `found` bytes fill the shape."""
    expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if found != expected:
        raise CorruptFile(
            f"the bytes of the array {name} do not fill its shape {shape}",
            path=path,
            expected=f"{expected} bytes",
            found=found,
        )
