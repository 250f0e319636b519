"""Malformed Flax, t5x and GGUF files are refused by name, before anything large is allocated."""

from __future__ import annotations

import gc
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.errors import CheckpointError, CorruptFile, TensorMismatch
from tests.conversion.dense import dense_t5
from tests.conversion.test_containers import nested, packed, write_gguf, write_zarr

FLAX, T5X = "flax_model.msgpack", "checkpoint"
ONES = torch.ones(2, 32)


def array(shape: Any, dtype: Any = "float32", content: Any = b"\0" * 8) -> bytes:
    """An array as Flax packs it, of parts that need not fit."""
    inner = packed((shape, dtype, content))
    return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner


def flax(value: bytes) -> Callable[[Path], None]:
    """A file that maps "shared" to a map from "embedding" to `value`."""
    start = b"\x81" + packed("shared") + b"\x81" + packed("embedding")
    return lambda folder: (folder / FLAX).write_bytes(start + value) and None


def chunked(**fields: Any) -> Callable[[Path], None]:
    sound = {"shape": {"0": 2, "1": 32}, "chunks": {"0": ONES[0], "1": ONES[1]}}
    return flax(packed({"__msgpack_chunked_array__": 1, **sound, **fields}))


MALFORMED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an absurd shape": (flax(array([2**39, 2**39])), "shared/embedding.*do not fill"),
    "a negative shape": (flax(array([-1, 2])), "shared/embedding.*malformed"),
    "a shape of text": (flax(array("wide")), "shared/embedding.*malformed"),
    "a dtype that is a list": (flax(array([2], ["float32"])), "shared/embedding.*malformed"),
    "content that is a text": (flax(array([2], content="no bytes")), "malformed"),
    "chunks without numbers": (chunked(chunks={"first": ONES}), "embedding.*malformed"),
    "chunks with a gap": (chunked(chunks={"0": ONES, "2": ONES}), "embedding.*malformed"),
    "chunks that are numbers": (chunked(chunks={"0": 1}), "embedding.*no array"),
    "chunks of two dtypes": (
        chunked(chunks={"0": ONES[0], "1": ONES[1].half()}), "embedding.*differ in dtype"),
    "chunks that are too few": (chunked(chunks={"0": ONES[0]}), "embedding.*do not fill"),
    "a chunked shape of text": (chunked(shape={"0": "a"}), "embedding.*malformed"),
    "a million values": (flax(b"\xdd" + struct.pack(">I", 2**20) + b"\0" * 2**20), "values"),
    "a text of a megabyte": (flax(packed("x" * 2**20)), "a text of"),
}  # fmt: skip


def refused(folder: Path, message: str, file: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(folder)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_flax_file_is_refused_by_array(kind: str, tmp_path: Path) -> None:
    spoil, message = MALFORMED[kind]
    spoil(tmp_path)
    refused(tmp_path, message, FLAX)


def t5x(target: Any, folder: Path) -> Path:
    (folder / T5X).write_bytes(packed({"optimizer": {"target": target}}))
    return folder


def stacked(rows: int, columns: int) -> dict[str, Any]:
    empty = torch.empty(rows, columns, 0)
    return nested({"encoder.layers_1.mlp.expert.wi.kernel": empty})


T5X_TARGETS: dict[str, tuple[Any, str]] = {
    "params that are no map": ({"params": 5}, "not a map of arrays"),
    "a path upwards": ({"../../x": "PLACEHOLDER://"}, "unsafe path"),
    "a name of a thousand letters": ({"x" * 1000: "PLACEHOLDER://"}, "is missing"),
    "a null byte": ({"x\0": "PLACEHOLDER://"}, "unsafe path"),
    "a hundred million experts": (stacked(10**8, 0), "more than .* tensors"),
}


@pytest.mark.parametrize("kind", T5X_TARGETS)
def test_a_malformed_t5x_checkpoint_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    target, message = T5X_TARGETS[kind]
    with pytest.raises(CheckpointError, match=message):
        open_source(t5x(target, tmp_path))


def test_a_chunked_array_of_t5x_is_read(tmp_path: Path) -> None:
    whole = torch.arange(64.0).view(2, 32)
    head = {
        "__msgpack_chunked_array__": 1,
        "shape": {"0": 2, "1": 32},
        "chunks": {"0": whole[0], "1": whole[1]},
    }
    t5x({"token_embedder": {"embedding": head}}, tmp_path)
    with open_source(tmp_path) as source:
        assert bytes(source.read("shared.weight")) == bytes(tensor_bytes(whole))


ZARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "a compressor that is a list": ({"compressor": ["gzip"]}, "compressed in a way"),
    "a compressor of a list": ({"compressor": {"id": ["gzip"]}}, "compressed in a way"),
    "a chunk of a terabyte": ({"chunks": [2**39, 2**39]}, "chunks are larger"),
    "a trillion chunks": ({"shape": [2**20, 2**20], "chunks": [1, 1]}, "more than .* chunks"),
    "a dtype that is a list": ({"dtype": [["a", "<f4"]]}, "unknown dtype"),
    "a number of many digits": ({"shape": [10**400, 1]}, "not a list of sizes"),
}


@pytest.mark.parametrize("kind", ZARRAYS)
def test_a_malformed_zarray_is_refused_by_file(kind: str, tmp_path: Path) -> None:
    fields, message = ZARRAYS[kind]
    name = "encoder.layers_0.mlp.wi.kernel"
    t5x(nested({name: "PLACEHOLDER://"}), tmp_path)
    write_zarr(torch.ones(4, 6), tmp_path / f"target.{name}")
    file = tmp_path / f"target.{name}" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    refused(tmp_path, message, ".zarray")


def test_a_missing_zarr_chunk_is_not_taken_for_zeros(tmp_path: Path) -> None:
    name = "encoder.layers_0.mlp.wi.kernel"
    t5x(nested({name: "PLACEHOLDER://"}), tmp_path)
    write_zarr(torch.ones(4, 6), tmp_path / f"target.{name}")
    (tmp_path / f"target.{name}" / "1.0").unlink()
    with open_source(tmp_path) as source, pytest.raises(CheckpointError, match=r"1\.0: no such"):
        source.read("encoder.block.0.layer.1.DenseReluDense.wi.weight")


def gguf_header(*, tensors: int = 0, values: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + values


def listed(kind: int, count: int) -> bytes:
    return struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, kind, count)


GGUFS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty"),
    "too many tensors": (gguf_header(tensors=2**40), "counts more"),
    "a list of numbers past the end": (
        gguf_header(values=listed(4, 2**62), count=1), "truncated"),
    "a list of a trillion texts": (gguf_header(values=listed(8, 2**40), count=1), "too long"),
    "a list of lists without end": (
        gguf_header(values=listed(9, 1) + struct.pack("<IQ", 9, 1) * 50, count=1), "too long"),
    "a name of a gigabyte": (
        gguf_header(values=struct.pack("<Q", 2**30), count=1) + b"\0" * 64, "a text of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUFS)
def test_a_malformed_gguf_header_is_refused_by_file(kind: str, tmp_path: Path) -> None:
    content, message = GGUFS[kind]
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path, message, "model.gguf")


def test_a_gguf_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    write_gguf("Q8_0")({"shared.weight": ONES}, tmp_path)
    path = tmp_path / "model.gguf"
    with open_source(tmp_path) as source:
        os.truncate(path, path.stat().st_size - 40)
        with pytest.raises(CorruptFile, match="ended early"):
            source.read("shared.weight")


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_a_closed_flax_source_lets_go_of_its_file(tmp_path: Path) -> None:
    (tmp_path / FLAX).write_bytes(packed({"shared": {"embedding": ONES}}))
    source = open_source(tmp_path)
    kept = source.tensor("shared.weight")
    assert maps_of(tmp_path) == 1
    source.close()
    gc.collect()
    assert maps_of(tmp_path) == 0 and torch.equal(kept, ONES)


def test_a_config_with_a_number_of_many_digits_is_refused(tmp_path: Path) -> None:
    (tmp_path / FLAX).write_bytes(packed({"shared": {"embedding": ONES}}))
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": ' + "9" * 5000 + "}")
    with pytest.raises(CorruptFile, match=r"config\.json: not valid JSON: a number is too long"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_decoder_layers": 4096}, "more layers than the checkpoint has weights"),
        ({"num_layers": 4096, "num_decoder_layers": 4096}, "more layers than"),
        ({"num_experts": 65_536, "num_sparse_encoder_layers": 1}, "lacks .*mlp.router"),
    ],
    ids=str,
)
def test_an_absurd_config_is_refused_without_naming_all_that_it_would_have(
    values: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = dense_t5(tmp_path / "dense")
    config = json.loads((path / "config.json").read_text())
    if "num_experts" in values:
        config |= {"model_type": "switch_transformers", "num_sparse_decoder_layers": 2}
    (path / "config.json").write_text(json.dumps({**config, **values}))
    tracemalloc.start()
    try:
        with pytest.raises(TensorMismatch, match=message):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
