"""The other containers give the same model: PyTorch .bin, Flax MessagePack, t5x, orbax, GGUF."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import moezoo
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.formats.msgpack import Malformed, unpack
from moezoo.errors import CheckpointError, CorruptFile
from tests.conversion.dense import dense_t5, ids, relative
from tests.conversion.orbax import write_item

SIZES = {"d_model": 32, "d_ff": 64}  # Q8_0 packs rows in blocks of 32
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["t5", "t5_v1_1"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_t5(tmp_path_factory.mktemp("dense") / "t5", request.param, **SIZES)


def packed(value: Any) -> bytes:
    """MessagePack, as Flax writes it."""
    if isinstance(value, dict):
        items = b"".join(packed(k) + packed(v) for k, v in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + items
    if isinstance(value, (list, tuple)):
        return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
    if isinstance(value, str):
        return b"\xdb" + struct.pack(">I", len(value.encode())) + value.encode()
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, torch.Tensor):
        inner = packed((list(value.shape), str(value.dtype)[6:], bytes(tensor_bytes(value))))
        return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner
    raise TypeError(type(value))


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return tree


def write_flax(weights: Weights, out: Path) -> None:
    flat: dict[str, Any] = {}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        if "layer_norm" in name:
            flat[name] = tensor
        elif stem == "shared" or "relative_attention_bias" in name:
            flat[f"{stem}.embedding"] = tensor
        else:
            flat[f"{stem}.kernel"] = tensor.T.contiguous()
    head = flat["shared.embedding"]
    flat["shared.embedding"] = {
        "__msgpack_chunked_array__": 1,
        "shape": {"0": head.shape[0], "1": head.shape[1]},
        "chunks": {"0": head.flatten()[:100].clone(), "1": head.flatten()[100:].clone()},
    }
    (out / "flax_model.msgpack").write_bytes(packed(nested(flat)))


def t5x_name(name: str, *, shared_bias: bool = True) -> str:
    tops = {
        "shared.weight": "token_embedder.embedding",
        "encoder.final_layer_norm.weight": "encoder.encoder_norm.scale",
        "decoder.final_layer_norm.weight": "decoder.decoder_norm.scale",
        "lm_head.weight": "decoder.logits_dense.kernel",
    }
    if name in tops:
        return tops[name]
    stack, _, block, _, layer, *rest = name.split(".")
    start = f"{stack}.layers_{block}"
    if "relative_attention_bias" in name:
        return f"{stack if shared_bias else start}.relpos_bias.rel_embedding"
    own = "attention" if stack == "encoder" else "self_attention"
    if rest[0] == "layer_norm":
        middle = {"0": f"pre_{own}_layer_norm", "1": "pre_cross_attention_layer_norm"}
        last = "1" if stack == "encoder" else "2"
        return f"{start}.{'pre_mlp_layer_norm' if layer == last else middle[layer]}.scale"
    if rest[0] == "DenseReluDense":
        return f"{start}.mlp.{rest[1]}.kernel"
    part = {"q": "query", "k": "key", "v": "value", "o": "out"}[rest[1]]
    attention = own if rest[0] == "SelfAttention" else "encoder_decoder_attention"
    return f"{start}.{attention}.{part}.kernel"


def write_zarr(tensor: torch.Tensor, folder: Path) -> None:
    folder.mkdir()
    rows, columns = tensor.shape
    chunks = [rows // 2 + 1, columns // 2 + 1]
    meta = {"shape": [rows, columns], "chunks": chunks, "dtype": "<f4", "order": "C",
            "compressor": {"id": "gzip", "level": 1}, "filters": None, "fill_value": None,
            "zarr_format": 2, "dimension_separator": "."}  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(meta))
    for i in range(2):
        for j in range(2):
            chunk = torch.zeros(chunks)
            part = tensor[i * chunks[0] : (i + 1) * chunks[0], j * chunks[1] : (j + 1) * chunks[1]]
            chunk[: part.shape[0], : part.shape[1]] = part
            (folder / f"{i}.{j}").write_bytes(gzip.compress(bytes(tensor_bytes(chunk))))


def t5x_arrays(weights: Weights) -> Weights:
    """A dense model's weights by flaxformer's names, turned as it has them."""
    arrays = {}
    shared_bias = not any("block.1.layer.0.SelfAttention.relative" in name for name in weights)
    for name, tensor in weights.items():
        theirs = t5x_name(name, shared_bias=shared_bias)
        transposed = tensor.dim() == 2 and theirs != "token_embedder.embedding"
        arrays[theirs] = tensor.T.contiguous() if transposed else tensor
    return arrays


def write_orbax(**layout: bool) -> Callable[[Weights, Path], None]:
    def write(weights: Weights, out: Path) -> None:
        arrays = {f"target.{name}": array for name, array in t5x_arrays(weights).items()}
        write_item(out, arrays | {"state.step": torch.tensor(5)}, **layout)

    return write


def write_t5x(weights: Weights, out: Path) -> None:
    flat: dict[str, Any] = {}
    for theirs, array in t5x_arrays(weights).items():
        if theirs.endswith("kernel"):
            flat[theirs] = f"PLACEHOLDER://target.{theirs}"
            write_zarr(array, out / f"target.{theirs}")
        else:
            flat[theirs] = array
    state = {"optimizer": {"target": nested(flat), "state": {"step": 5}}, "version": 3}
    (out / "checkpoint").write_bytes(packed(state))


def gguf_name(name: str) -> str:
    tops = {
        "shared.weight": "token_embd",
        "encoder.final_layer_norm.weight": "enc.output_norm",
        "decoder.final_layer_norm.weight": "dec.output_norm",
        "lm_head.weight": "output",
    }
    if name in tops:
        return f"{tops[name]}.weight"
    stack, _, block, _, layer, *rest = name.split(".")
    start = f"{stack[:3]}.blk.{block}"
    last = "1" if stack == "encoder" else "2"
    if rest[0] == "layer_norm":
        norm = "ffn_norm" if layer == last else {"0": "attn_norm", "1": "cross_attn_norm"}[layer]
        return f"{start}.{norm}.weight"
    if rest[0] == "DenseReluDense":
        names = {"wi": "ffn_up", "wi_0": "ffn_gate", "wi_1": "ffn_up", "wo": "ffn_down"}
        return f"{start}.{names[rest[1]]}.weight"
    kind = "attn" if rest[0] == "SelfAttention" else "cross_attn"
    return f"{start}.{kind}_{'rel_b' if rest[1] == 'relative_attention_bias' else rest[1]}.weight"


def quantised(tensor: torch.Tensor) -> bytes:
    blocks = tensor.reshape(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scale.float().clamp(min=1e-9)).round().clamp(-127, 127).to(torch.int8)
    rows = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=1)
    return bytes(tensor_bytes(rows))


def write_gguf(kind: str) -> Callable[[Weights, Path], None]:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def write(weights: Weights, out: Path) -> None:
        infos, data = b"", b""
        for name, tensor in weights.items():
            matrix = tensor.dim() == 2 and tensor.shape[-1] % 32 == 0
            number = {"F16": 1, "Q8_0": 8, "F32": 0}[kind if matrix else "F32"]
            content = {0: lambda t: bytes(tensor_bytes(t)), 8: quantised,
                       1: lambda t: bytes(tensor_bytes(t.half()))}[number](tensor)  # fmt: skip
            shape = b"".join(struct.pack("<Q", n) for n in reversed(tensor.shape))
            infos += text(gguf_name(name)) + struct.pack("<I", tensor.dim()) + shape
            infos += struct.pack("<IQ", number, len(data))
            data += content + b"\0" * (-len(content) % 32)
        values = text("general.architecture") + struct.pack("<I", 8) + text("t5")
        values += text("tokenizer.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 1, 2)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), 2) + values + infos
        (out / "model.gguf").write_bytes(head + b"\0" * (-len(head) % 32) + data)

    return write


def write_bin(weights: Weights, out: Path) -> None:
    torch.save(weights, out / "pytorch_model.bin")


CONTAINERS: dict[str, tuple[Callable[[Weights, Path], None], float]] = {
    "torch": (write_bin, 0.0),
    "flax": (write_flax, 0.0),
    "t5x": (write_t5x, 0.0),
    "orbax ocdbt": (write_orbax(), 0.0),
    "orbax zarr3": (write_orbax(packed=False, zarr3=True), 0.0),
    "gguf F32": (write_gguf("F32"), 0.0),
    "gguf F16": (write_gguf("F16"), 2e-3),
    "gguf Q8_0": (write_gguf("Q8_0"), 2e-2),
}


def written(kind: str, dense: Path, out: Path) -> Path:
    out.mkdir()
    CONTAINERS[kind][0](load_file(dense / "model.safetensors"), out)
    (out / "config.json").write_bytes((dense / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_weights_of_the_model(
    kind: str, dense: Path, tmp_path: Path
) -> None:
    path = written(kind, dense, tmp_path / "other")
    expected = load_file(dense / "model.safetensors")
    with open_source(path) as source:
        assert source.kind == kind.split()[0] and set(source.tensors) == set(expected)
        for name, tensor in expected.items():
            found = source.tensor(name)
            assert bytes(source.read(name)) == bytes(tensor_bytes(found))
            if CONTAINERS[kind][1] == 0.0:
                assert torch.equal(found, tensor), name
            assert torch.allclose(found.float(), tensor, atol=CONTAINERS[kind][1]), name


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_upcycles_and_keeps_its_function(
    kind: str, dense: Path, tmp_path: Path
) -> None:
    path = written(kind, dense, tmp_path / "other")
    moezoo.upcycle(path, tmp_path / "out", num_experts=2, dtype="float32")
    with torch.no_grad():
        before = moezoo.load(path, dtype=torch.float32)(ids(), decoder_input_ids=ids()).logits
        model = moezoo.load(tmp_path / "out", capacity="dropless")
        after = model(ids(), decoder_input_ids=ids()).logits
    assert relative(after, before) <= 1e-5


def test_config_json_names_the_dtype_of_most_weights(dense: Path, tmp_path: Path) -> None:
    path = written("gguf F16", dense, tmp_path / "other")  # its norms are float32
    moezoo.upcycle(path, tmp_path / "out", num_experts=2)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("kind", ["flax", "t5x", "gguf F16", "gguf Q8_0"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_a_cut_container_is_refused_by_name(
    kind: str, share: float, dense: Path, tmp_path: Path
) -> None:
    path = written(kind, dense, tmp_path / "other")
    names = ("flax_model.msgpack", "checkpoint", "model.gguf")
    (file,) = [path / name for name in names if (path / name).exists()]
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(CheckpointError, match=file.name):
        moezoo.load(path)


def test_a_t5x_array_that_is_missing_or_corrupt_is_refused_by_name(
    dense: Path, tmp_path: Path
) -> None:
    path = written("t5x", dense, tmp_path / "other")
    folder = path / "target.encoder.layers_0.attention.query.kernel"
    (folder / "0.1").write_bytes(b"no gzip")
    with pytest.raises(CorruptFile, match="cannot be unpacked"):
        moezoo.load(path)
    (folder / ".zarray").write_text('{"shape": [2, "x"], "chunks": [1, 1]}')
    with pytest.raises(CorruptFile, match="shape is not a list"):
        moezoo.load(path)
    folder.rename(path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"attention\.query\.kernel"):
        moezoo.load(path)


@given(content=st.binary(max_size=60))
def test_any_bytes_are_messagepack_or_refused(content: bytes) -> None:
    try:
        unpack(memoryview(content))
    except Malformed as error:
        assert str(error)


@given(data=st.data())
def test_any_mutation_of_a_gguf_file_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    write_gguf("Q8_0")({"shared.weight": torch.ones(2, 32)}, path.parent)
    content = bytearray((path.parent / "model.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        open_source(path).close()
    except CheckpointError as error:
        assert str(path) in str(error)
