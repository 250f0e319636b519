"""The safetensors container: a checked header of JSON, then the tensors' bytes without gaps.

Read with the standard library alone, so that planning and streaming need no torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.adapters.formats.base import DTYPE_BITS, Source, TensorInfo
from moezoo.adapters.formats.files import (
    parse_json,
    quoted,
    read_start,
    refuse_pointer,
    regular_file,
)
from moezoo.adapters.formats.index import check_shard, read_index
from moezoo.errors import CorruptFile

if TYPE_CHECKING:
    import torch

_AGAIN = "Download it again."
_MAX_HEADER = 100_000_000  # the limit of the format's own reader
_MAX_SIZE = 2**63 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}


class SafetensorsSource(Source):
    """One safetensors file, or a sharded checkpoint named by its `*.index.json`."""

    kind = "safetensors"

    def __init__(self, path: Path, *, file: Path | None = None, index: Path | None = None) -> None:
        if index is None:
            file = path if file is None else file
            super().__init__(path, (file,))
            self.tensors, self.metadata = read_header(file)
            return
        shards = read_index(index)
        super().__init__(path, tuple(index.parent / name for name in sorted(shards)))
        self.metadata = {}
        for shard in self.files:
            tensors, metadata = read_header(shard)
            check_shard(index, shard, shards[shard.name], set(tensors))
            self.tensors.update(tensors)
            self.metadata.update(metadata)

    def read(self, name: str) -> memoryview:
        return self._read_range(self.info(name))

    def tensor(self, name: str) -> torch.Tensor:
        return self._mapped(self.info(name))


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors (in file order) and the metadata of one safetensors file.

    Raises CorruptFile naming the file and the key for everything that the format forbids:
    truncated, absurd or non-JSON headers, duplicate names, unknown dtypes, shapes that overflow,
    and offsets that overlap, leave holes or pass the end of the file.
    """
    size = regular_file(path)
    start = read_start(path, 64)
    refuse_pointer(path, start)
    if size < 8:
        raise CorruptFile(
            "too short for a safetensors file", path=path, found=f"{size} bytes", hint=_AGAIN
        )
    length = int.from_bytes(start[:8], "little")
    if length > min(_MAX_HEADER, size - 8) or length < 2:
        raise CorruptFile(
            "the header's length is impossible: truncated, or no safetensors file",
            path=path,
            expected=f"2 to {min(_MAX_HEADER, size - 8)} bytes",
            found=length,
            hint=_AGAIN,
        )
    header = parse_json(read_start(path, 8 + length)[8:], path, CorruptFile)
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    tensors = [_tensor(name, entry, path, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_offsets(tensors, path, 8 + length, size)
    return {info.name: info for info in tensors}, metadata


def _tensor(name: str, entry: Any, path: Path, base: int) -> TensorInfo:
    def corrupt(what: str, found: object) -> CorruptFile:
        shown = quoted(found)
        return CorruptFile(f"tensor {quoted(name)}: {what}", path=path, key=name, found=shown)

    if not _encodable(name):
        raise corrupt("its name is not valid Unicode", name)
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise corrupt("its header entry needs exactly dtype, shape and data_offsets", type(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise corrupt("unknown dtype", dtype)
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_size, shape)):
        raise corrupt("its shape is not a list of sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise corrupt("its data_offsets are not two positions", offsets)
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if nbytes > _MAX_SIZE or offsets[1] - offsets[0] != nbytes:
        raise corrupt(f"its shape {shape} needs {nbytes} bytes, the offsets disagree", offsets)
    return TensorInfo(name, dtype, tuple(shape), path, base + offsets[0])


def _check_offsets(tensors: list[TensorInfo], path: Path, base: int, size: int) -> None:
    end = base
    for info in tensors:
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "follows a hole"
            raise CorruptFile(f"tensor {quoted(info.name)} {what}", path=path, key=info.name)
        end += info.nbytes
        if end > size:
            raise CorruptFile(
                f"tensor {quoted(info.name)} passes the end of the file: truncated",
                path=path,
                key=info.name,
                expected=f"{end} bytes",
                found=size,
                hint=_AGAIN,
            )
    if end != size:
        raise CorruptFile(
            "bytes follow the last tensor", path=path, expected=f"{end} bytes", found=size,
            hint=_AGAIN,
        )  # fmt: skip


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFile("__metadata__ does not map strings to strings", path=path)
    return metadata


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_SIZE


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
