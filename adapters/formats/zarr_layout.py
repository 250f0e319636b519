"""What the metadata of a zarr array claims, version 2 or 3, judged before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.adapters.formats.files import quoted
from moezoo.errors import CheckpointError, CorruptFile

_ZARR2 = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "bfloat16": "BF16", "<i4": "I32", "<i8": "I64"}
_ZARR3 = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "bfloat16": "BF16",
    "int32": "I32",
    "int64": "I64",
}
_CODECS = ("bytes", "zstd", "gzip", "crc32c")
_SHARDED = "sharding_indexed"
_MAX_CHUNKS = 1 << 16  # t5x writes one per accelerator
_MAX_RANK = 16


@dataclass(frozen=True)
class Layout:
    """An array's safetensors dtype, its shape, and the shape of the chunks that it is stored in.

    `compressor` is that of version 2; the codecs of version 3 are not told.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    compressor: str | None = None


def zarr2_layout(meta: Mapping[str, Any], path: Path, compressors: Sequence[str]) -> Layout:
    """What a `.zarray` claims.

    Raises CorruptFile naming the file for malformed metadata, CheckpointError for other compressors
    than these, filters and column-major order.
    """
    shape, chunks = _grid(meta.get("shape"), meta.get("chunks"), path)
    dtype = _dtype(meta.get("dtype"), _ZARR2, path)
    compressor = meta.get("compressor")
    kind = compressor.get("id") if isinstance(compressor, dict) else compressor
    if kind is not None and (not isinstance(kind, str) or kind not in compressors):
        raise _unreadable(kind, f"{', '.join(compressors)} or none", path)
    if meta.get("order", "C") != "C" or meta.get("filters"):
        raise CheckpointError("column-major or filtered arrays cannot be read", path=path)
    separator = meta.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise CorruptFile("unknown dimension_separator", path=path, found=quoted(separator))
    return Layout(dtype, shape, chunks, kind)


def zarr3_layout(meta: Mapping[str, Any], path: Path) -> Layout:
    """What a `zarr.json` claims: chunks of one size, plain, compressed or gathered in shards.

    Raises as `zarr2_layout`.
    """
    kind, places = meta.get("node_type"), meta.get("chunk_grid")
    if kind != "array" or not isinstance(places, dict) or places.get("name") != "regular":
        raise CorruptFile("no array with a regular chunk_grid", path=path, key="chunk_grid")
    shape, chunks = _grid(meta.get("shape"), _setting(places, "chunk_shape"), path)
    dtype = _dtype(meta.get("data_type"), _ZARR3, path)
    _check_codecs(meta.get("codecs"), path, chunks)
    return Layout(dtype, shape, chunks)


def _check_codecs(codecs: Any, path: Path, chunks: tuple[int, ...] | None) -> None:
    """Raise unless orbax writes such codecs; without `chunks` they are those inside a shard."""
    known = _CODECS if chunks is None else (*_CODECS, _SHARDED)
    if not isinstance(codecs, list) or len(codecs) > len(known):
        raise CorruptFile("codecs is no list of codecs", path=path, key="codecs")
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        if not isinstance(name, str) or name not in known:
            raise _unreadable(name, ", ".join(known), path)
        if name == _SHARDED:
            assert chunks is not None
            _grid(list(chunks), _setting(codec, "chunk_shape"), path)
            for key in ("codecs", "index_codecs"):
                _check_codecs(_setting(codec, key), path, None)


def _setting(part: Any, key: str) -> Any:
    values = part.get("configuration") if isinstance(part, dict) else None
    return values.get(key) if isinstance(values, dict) else None


def _grid(shape: Any, chunks: Any, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for name, sizes in (("shape", shape), ("chunks", chunks)):
        if not isinstance(sizes, list) or not all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**40 for n in sizes
        ):
            raise CorruptFile(f"{name} is not a list of sizes", path=path, key=name)
    fit = len(shape) == len(chunks) <= _MAX_RANK and 0 not in chunks
    if not fit or math.prod(shape) > 2**40:
        raise CorruptFile("shape and chunks do not fit", path=path, key="chunks")
    if any(c > 2 * max(n, 1) for n, c in zip(shape, chunks, strict=True)):
        raise CorruptFile("its chunks are larger than the array", path=path, key="chunks")
    if math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True)) > _MAX_CHUNKS:
        raise CorruptFile(f"it has more than {_MAX_CHUNKS} chunks", path=path, key="chunks")
    return tuple(shape), tuple(chunks)


def _dtype(found: Any, known: Mapping[str, str], path: Path) -> str:
    if not isinstance(found, str) or found not in known:
        raise CorruptFile("unknown dtype", path=path, key="dtype", found=quoted(found))
    return known[found]


def _unreadable(found: object, expected: str, path: Path) -> CheckpointError:
    return CheckpointError(
        "compressed in a way that moezoo cannot read",
        path=path,
        expected=expected,
        found=quoted(found),
    )
