"""Zarr arrays (version 2), as t5x writes them: a folder of chunks, plain or compressed by gzip."""

from __future__ import annotations

import itertools
import math
import zlib
from functools import partial
from pathlib import Path

from moezoo.adapters.formats.base import DTYPE_BITS
from moezoo.adapters.formats.files import read_json, read_start, regular_file
from moezoo.adapters.formats.stored import Array
from moezoo.adapters.formats.zarr_layout import zarr2_layout
from moezoo.errors import CorruptFile

_WINDOW = {"gzip": 31, "zlib": 15}


def open_zarr(folder: Path) -> Array:
    """The array in a zarr folder; its chunks are read when its bytes are wanted.

    Raises CorruptFile naming the file for a malformed `.zarray`, CheckpointError for what t5x never
    writes (other compressors, filters, column-major order). zarr takes a missing chunk for zeros;
    here every chunk must be there, since a download that stopped early looks the same.
    """
    path = folder / ".zarray"
    meta = read_json(path)
    layout = zarr2_layout(meta, path, tuple(_WINDOW))
    separator = meta.get("dimension_separator", ".")
    kind, size = layout.compressor, DTYPE_BITS[layout.dtype] // 8
    read = partial(_read, folder, layout.shape, layout.chunks, size, kind, separator)
    if not layout.shape:
        return Array(layout.dtype, layout.shape, read)
    return Array(layout.dtype, layout.shape, read, rows=read, together=layout.chunks[0])


def _read(
    folder: Path,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    size: int,
    kind: str | None,
    separator: str,
    start: int = 0,
    stop: int | None = None,
) -> memoryview:
    """The array's bytes, or those of entries of its first axis, from where a chunk begins."""
    if stop is not None:
        shape = (stop - start, *shape[1:])
    whole = memoryview(bytearray(math.prod(shape) * size))
    grid = [range(math.ceil(n / c)) for n, c in zip(shape, chunks, strict=True)]
    before = start // chunks[0] if chunks else 0
    for place in itertools.product(*grid):
        name = separator.join(map(str, (place[0] + before, *place[1:]))) if place else "0"
        content = _chunk(folder / name, kind, math.prod(chunks) * size)
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
