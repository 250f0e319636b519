"""Zarr arrays (version 2), as t5x writes them: a folder of chunks, plain or compressed by gzip."""

from __future__ import annotations

import itertools
import math
import zlib
from functools import partial
from pathlib import Path

from moezoo.adapters.formats.base import DTYPE_BITS
from moezoo.adapters.formats.files import quoted, read_json, read_start, regular_file
from moezoo.adapters.formats.stored import Array
from moezoo.errors import CheckpointError, CorruptFile

_DTYPES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "bfloat16": "BF16", "<i4": "I32", "<i8": "I64"}
_WINDOW = {"gzip": 31, "zlib": 15}
_MAX_CHUNKS = 1 << 16  # t5x writes one per accelerator


def open_zarr(folder: Path) -> Array:
    """The array in a zarr folder; its chunks are read when its bytes are wanted.

    Raises CorruptFile naming the file for a malformed `.zarray`, CheckpointError for what t5x never
    writes (other compressors, filters, column-major order). zarr takes a missing chunk for zeros;
    here every chunk must be there, since a download that stopped early looks the same.
    """
    path = folder / ".zarray"
    meta = read_json(path)
    shape, chunks = meta.get("shape"), meta.get("chunks")
    for name, sizes in (("shape", shape), ("chunks", chunks)):
        if not isinstance(sizes, list) or not all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**40 for n in sizes
        ):
            raise CorruptFile(f"{name} is not a list of sizes", path=path, key=name)
    assert isinstance(shape, list) and isinstance(chunks, list)
    if len(shape) != len(chunks) or 0 in chunks or math.prod(shape) > 2**40:
        raise CorruptFile("shape and chunks do not fit", path=path, key="chunks")
    if any(c > 2 * max(n, 1) for n, c in zip(shape, chunks, strict=True)):
        raise CorruptFile("its chunks are larger than the array", path=path, key="chunks")
    if math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True)) > _MAX_CHUNKS:
        raise CorruptFile(f"it has more than {_MAX_CHUNKS} chunks", path=path, key="chunks")
    dtype = meta.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CorruptFile("unknown dtype", path=path, key="dtype", found=quoted(dtype))
    compressor = meta.get("compressor")
    kind = compressor.get("id") if isinstance(compressor, dict) else compressor
    if kind is not None and (not isinstance(kind, str) or kind not in _WINDOW):
        raise CheckpointError(
            "compressed in a way that moezoo cannot read",
            path=path,
            expected="gzip, zlib or none",
            found=quoted(kind),
        )
    if meta.get("order", "C") != "C" or meta.get("filters"):
        raise CheckpointError("column-major or filtered arrays cannot be read", path=path)
    separator = meta.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise CorruptFile("unknown dimension_separator", path=path, found=quoted(separator))
    name = _DTYPES[dtype]
    read = partial(
        _read, folder, tuple(shape), tuple(chunks), DTYPE_BITS[name] // 8, kind, separator
    )
    return Array(name, tuple(shape), read)


def _read(
    folder: Path,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    size: int,
    kind: str | None,
    separator: str,
) -> memoryview:
    whole = memoryview(bytearray(math.prod(shape) * size))
    grid = [range(math.ceil(n / c)) for n, c in zip(shape, chunks, strict=True)]
    for place in itertools.product(*grid):
        path = folder / (separator.join(map(str, place)) or "0")
        content = _chunk(path, kind, math.prod(chunks) * size)
        _paste(whole, shape, content, chunks, place, size)
    return whole


def _chunk(path: Path, kind: str | None, expected: int) -> bytes:
    content = read_start(path, regular_file(path))
    if kind is not None:
        try:
            inflate = zlib.decompressobj(_WINDOW[kind])
            content = inflate.decompress(content, expected + 1)
        except zlib.error as error:
            raise CorruptFile(f"a chunk cannot be unpacked: {error}", path=path) from None
    if len(content) != expected:
        raise CorruptFile(
            "a chunk has the wrong size", path=path, expected=expected, found=len(content)
        )
    return content


def _paste(
    whole: memoryview,
    shape: tuple[int, ...],
    content: bytes,
    chunks: tuple[int, ...],
    place: tuple[int, ...],
    size: int,
) -> None:
    """Copy a chunk into the array, row by row; what sticks out over the edge is padding."""
    if not shape:
        whole[:] = content
        return
    starts = [p * c for p, c in zip(place, chunks, strict=True)]
    counts = [min(c, n - s) for c, n, s in zip(chunks, shape, starts, strict=True)]
    row = counts[-1] * size
    for inner in itertools.product(*(range(count) for count in counts[:-1])):
        source = target = 0
        for axis, index in enumerate(inner):
            source = source * chunks[axis] + index
            target = target * shape[axis] + starts[axis] + index
        source = source * chunks[-1] * size
        target = (target * shape[-1] + starts[-1]) * size
        whole[target : target + row] = content[source : source + row]
