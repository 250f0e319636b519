"""Experts that are stored as one array are read once, whatever the chunks and the order."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moezoo.adapters.formats import zarr
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.formats.stored import Array, StoredSource
from moezoo.adapters.formats.zarr import open_zarr

SHAPE = (5, 4, 3)  # experts, and a matrix as flaxformer turns it
ORDERS = {
    "matrix by matrix": [(m, e) for m in "abc" for e in range(5)],
    "expert by expert": [(m, e) for e in range(5) for m in "abc"],
}


def write_stack(stack: torch.Tensor, chunks: tuple[int, ...], folder: Path) -> int:
    """Write a zarr array of gzipped chunks; how many there are."""
    folder.mkdir()
    meta = {"zarr_format": 2, "shape": list(stack.shape), "chunks": list(chunks), "dtype": "<f4",
            "compressor": {"id": "gzip", "level": 1}, "order": "C", "filters": None,
            "fill_value": None}  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(meta))
    places = [range(math.ceil(n / c)) for n, c in zip(stack.shape, chunks, strict=True)]
    for place in itertools.product(*places):
        chunk = torch.zeros(chunks)
        inside = tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunks, strict=True))
        part = stack[inside]
        chunk[tuple(slice(n) for n in part.shape)] = part
        (folder / ".".join(map(str, place))).write_bytes(gzip.compress(bytes(tensor_bytes(chunk))))
    return math.prod(map(len, places))


def source_of(arrays: dict[str, Array], path: Path) -> StoredSource:
    class Plain(StoredSource):
        kind = "t5x"

    source = Plain(path, ())
    for matrix, array in arrays.items():
        for expert in range(array.shape[0]):
            source.add(f"{matrix}.{expert}", array, expert=expert, transposed=True)
    return source


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("chunks", [(1, 4, 3), (2, 4, 2), (3, 1, 3), (5, 4, 3), (7, 4, 3)])
def test_every_chunk_of_a_stack_is_read_once(
    chunks: tuple[int, ...], order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = {matrix: torch.randn(SHAPE) for matrix in "abc"}
    count = sum(write_stack(stacks[m], chunks, tmp_path / m) for m in stacks)
    read: list[Path] = []
    chunk = zarr._chunk

    def counted(path: Path, *rest: Any) -> bytes:
        read.append(path)
        return chunk(path, *rest)

    monkeypatch.setattr(zarr, "_chunk", counted)
    source = source_of({m: open_zarr(tmp_path / m) for m in stacks}, tmp_path)
    for matrix, expert in ORDERS[order]:
        found = source.tensor(f"{matrix}.{expert}")
        assert torch.equal(found, stacks[matrix][expert].T)
        found.zero_()  # what is given out is the caller's
        assert source.read(f"{matrix}.{expert}") == tensor_bytes(stacks[matrix][expert].T)
    assert len(read) == len(set(read)) == count
    assert torch.equal(open_zarr(tmp_path / "a").tensor(tmp_path, "a"), stacks["a"])


def test_a_stack_that_comes_whole_is_read_once_and_few_are_held(tmp_path: Path) -> None:
    stacks = {matrix: torch.randn(SHAPE) for matrix in "abcdef"}
    reads: list[str] = []

    def array(matrix: str) -> Array:
        def read() -> bytes:
            reads.append(matrix)
            return bytes(tensor_bytes(stacks[matrix]))

        return Array("F32", SHAPE, read)

    source = source_of({matrix: array(matrix) for matrix in stacks}, tmp_path)
    for matrix in stacks:
        for expert in (4, 0, 2):
            assert torch.equal(source.tensor(f"{matrix}.{expert}"), stacks[matrix][expert].T)
    assert reads == list("abcdef")
    assert len(source._stacks) == 3
    source.close()
    assert not source._stacks
