"""Writing safetensors files tensor by tensor, in any order, with one small buffer. No torch.

All tensors are planned first (names, dtypes, shapes); then each tensor's bytes go to their place.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moezoo.adapters.direct import PAGE, DirectFile, allocate, direct_flags, write_all
from moezoo.adapters.formats.base import DTYPE_BITS
from moezoo.adapters.fused import place_of, whole_name
from moezoo.adapters.open_files import OpenFiles
from moezoo.adapters.portable import flush_data, open_binary, read_at
from moezoo.errors import ConfigError, SaveError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def wholes(tensors: Iterable[TensorPlan]) -> list[TensorPlan]:
    """Tensors as a file holds them: parts of one (`moezoo.adapters.fused`) are together in their
    whole ([experts,] rows of all parts, columns), where the first of them stands.
    """
    found: dict[str, TensorPlan] = {}
    counts: dict[str, int] = {}
    for tensor in tensors:
        place = place_of(tensor.name)
        name = tensor.name if place is None else place.whole
        counts[name] = counts.get(name, 0) + 1
        if place is None:
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        shape: tuple[int, ...] = (counts[name] // place.parts, rows * place.parts, columns)
        if not place.of_experts:
            before = found[name].shape[0] if name in found else 0
            shape = (before + rows, columns)
        found[name] = TensorPlan(name, tensor.dtype, shape)
    return list(found.values())


def parse_size(size: int | str) -> int:
    """Bytes from 5_000_000, "5GB" or "4.5GiB". Raises ConfigError."""
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
        unit = _UNITS.get((match[2] or "B").upper()) if match else None
        if match and unit:
            size = int(float(match[1]) * unit)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(
            "not a size", field="max_shard_size", expected="such as '5GB'", found=repr(size)[:80]
        )
    return size


def shard(
    tensors: Iterable[TensorPlan], max_shard_size: int | str | None, stem: str = "model"
) -> dict[str, list[TensorPlan]]:
    """The tensors per file, in order, none larger than `max_shard_size` unless one tensor is.

    One shard is called `model.safetensors`, several `model-00001-of-00003.safetensors`.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    tensors = list(tensors)
    parts: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        parts.setdefault(whole_name(tensor.name), []).append(tensor)
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in wholes(tensors):
        if limit is not None and groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].extend(parts[tensor.name])
        filled += tensor.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    count = len(groups)
    return {f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups)}


def shard_index(shards: Mapping[str, Iterable[TensorPlan]]) -> bytes:
    """The index file that names the shard of every tensor."""
    held = {file: list(group) for file, group in shards.items()}
    weight_map = {whole_name(t.name): file for file, group in held.items() for t in group}
    total = sum(tensor.nbytes for group in held.values() for tensor in group)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def header(tensors: Iterable[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """The length and JSON header of a safetensors file; the data after it begin on a page."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """One safetensors file being written: put each tensor's bytes in any order, then `close`.

    `close` raises SaveError naming the first tensor that is not whole. An existing file is written
    over in place, which is how a conversion resumes. Tensors of whole pages come first, then those
    of the next power of two, so that all begin at a multiple of what their size is a multiple of:
    the last bits of a product may depend on where its operands lie.

    `direct` writes past the system's cache; None where the file system has no such thing, or where
    it was not asked for. Shards of one output share `files`, so that few are open at a time.

    `begun`: the file is there already, of the same tensors: nothing but what is put is written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[TensorPlan],
        metadata: Mapping[str, str] | None = None,
        *,
        direct: bool = False,
        files: OpenFiles | None = None,
        begun: bool = False,
    ) -> None:
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self._order = sorted(wholes(self.tensors.values()), key=_alignment, reverse=True)
        start = header(self._order, metadata or {})
        self._header_size = len(start)
        self._offsets: dict[str, int] = {}
        end = len(start)
        for tensor in self._order:
            self._offsets[tensor.name] = end
            end += tensor.nbytes
        for tensor in self.tensors.values():
            place = place_of(tensor.name)
            if place is not None:
                before = place.number * tensor.nbytes
                if not place.of_experts:
                    before = sum(self.tensors[name].nbytes for name in place.before())
                self._offsets[tensor.name] = self._offsets[place.whole] + before
        self.nbytes = end
        self._written = dict.fromkeys(self.tensors, 0)
        self._files = OpenFiles() if files is None else files
        self._open = partial(self._files.use, path, os.O_RDWR)
        self.direct: DirectFile | None = None
        if begun:
            return
        os.close(open_binary(path, os.O_RDWR | os.O_CREAT))
        with self._open() as descriptor:
            os.ftruncate(descriptor, end)
            past_cache = direct_flags(path) if direct else None
            if past_cache is not None:
                allocate(descriptor, end)
                self.direct = DirectFile(self._open, partial(self._files.use, path, past_cache))
        self._put(start, 0)

    def put(self, name: str, content: bytes | memoryview, offset: int = 0) -> None:
        """Write bytes of a tensor, `offset` bytes into it. Each byte is to be written once."""
        self._put(content, self.claim(name, len(content), offset))

    def claim(self, name: str, size: int, offset: int = 0) -> int:
        """Where `size` bytes of a tensor belong in the file; they count as written."""
        if offset + size > self.tensors[name].nbytes:
            raise SaveError(f"more bytes than the tensor {name!r} has", path=self.path, key=name)
        self._written[name] += size
        return self._offsets[name] + offset

    def holds(self, name: str, content: bytes | memoryview, offset: int = 0) -> bool:
        """Whether the file holds these bytes already; if so they count as written."""
        found = memoryview(bytearray(len(content)))
        with self._open() as descriptor:
            count = read_at(descriptor, found, self._offsets[name] + offset)
        if count != len(content) or found != content:
            return False
        self._written[name] += len(content)
        return True

    def rewrite_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by other metadata of the same length."""
        start = header(self._order, metadata)
        assert len(start) == self._header_size, "metadata may change its values, not its length"
        self._put(start, 0)

    def flush(self) -> None:
        """Send what is written to the disk."""
        with self._open() as descriptor:
            flush_data(descriptor)

    def close(self, *, whole: bool = True) -> None:
        """Check that every tensor is whole, unless others write too; flush to disk, close."""
        planned = self.tensors.values()
        short = next((t for t in planned if self._written[t.name] != t.nbytes), None)
        if short is not None and whole:
            self.abandon()
            raise SaveError(
                f"the tensor {short.name!r} was not written whole", path=self.path, key=short.name
            )
        with self._open() as descriptor:
            os.fsync(descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Close without a check."""
        self._files.close(self.path)

    def _put(self, content: bytes | memoryview, position: int) -> None:
        with self._open() as descriptor:
            write_all(descriptor, content, position)


def _alignment(tensor: TensorPlan) -> int:
    """The largest power of two that divides a tensor's size, a page at most."""
    return min(tensor.nbytes & -tensor.nbytes or PAGE, PAGE)


Pieces = Iterable[tuple[int, bytes | memoryview]]  # where in a tensor, in bytes, and what


def write_tensors(
    directory: Path,
    tensors: Mapping[str, tuple[TensorPlan, bytes | memoryview]],
    *,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write tensors that are in memory as `model.safetensors`, or as shards with an index.

    For use inside `replacing_directory`, which makes it atomic. Returns the files written.
    """
    output = TensorFiles(
        directory, [plan for plan, _ in tensors.values()], max_shard_size, metadata
    )
    files = output.begin()
    output.write({name: partial(_at_once, content) for name, (_, content) in tensors.items()})
    return files


def _at_once(content: bytes | memoryview) -> Pieces:
    return [(0, content)]


@dataclass(frozen=True)
class TensorFiles:
    """`model.safetensors`, or shards with an index, written by one process or by several: one makes
    the files, then each writes what it holds.
    """

    directory: Path
    plans: Sequence[TensorPlan]
    max_shard_size: int | str | None = None
    metadata: Mapping[str, str] | None = None

    def begin(self) -> list[Path]:
        """Make the files, without their tensors. Returns their paths."""
        shards = shard(self.plans, self.max_shard_size)
        for name, group in shards.items():
            TensorFile(self.directory / name, group, self.metadata).abandon()
        files = [self.directory / name for name in shards]
        if len(shards) > 1:
            files.append(self.directory / "model.safetensors.index.json")
            files[-1].write_bytes(shard_index(shards))
        return files

    def write(self, contents: Mapping[str, Callable[[], Pieces]], *, whole: bool = True) -> int:
        """Put the pieces of tensors into their places, one tensor at a time; the bytes written.

        Raises SaveError for a tensor that is not whole, unless others write the rest.
        """
        count = 0
        for name, group in shard(self.plans, self.max_shard_size).items():
            file = TensorFile(self.directory / name, group, self.metadata, begun=True)
            try:
                for plan in group:
                    for offset, content in contents[plan.name]():
                        file.put(plan.name, content, offset)
                        count += len(content)
                file.close(whole=whole)
            finally:
                file.abandon()
        return count
