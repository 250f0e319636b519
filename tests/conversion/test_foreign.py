"""What lies beside the usual: shards of Flax, LongT5, and containers that are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import moezoo
from moezoo.adapters.formats import open_source
from moezoo.adapters.sparse import sparse
from moezoo.adapters.upcycle.export import export
from moezoo.errors import CheckpointError, ConfigError, IndexFileError, TensorMismatch
from tests.conversion.dense import SIZES, dense_t5, ids
from tests.conversion.test_containers import nested, packed, write_t5x


def flax_shards(dense: Path, out: Path) -> Path:
    """The model in two shards and their index, as transformers 4 wrote large Flax models."""
    out.mkdir()
    flat = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        table = stem == "shared" or "relative_attention_bias" in name
        ending = "weight" if "layer_norm" in name else "embedding" if table else "kernel"
        flat[f"{stem}.{ending}"] = tensor.T.contiguous() if ending == "kernel" else tensor
    names, weight_map = sorted(flat), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"flax_model-{number:05d}-of-00002.msgpack"
        (out / file).write_bytes(packed(nested({name: flat[name] for name in part})))
        weight_map |= {name.replace(".", "/"): file for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    (out / "config.json").write_bytes((dense / "config.json").read_bytes())
    return out


def test_shards_of_flax_load_and_a_missing_one_is_named(tmp_path: Path) -> None:
    dense = dense_t5(tmp_path / "dense")
    path = flax_shards(dense, tmp_path / "flax")
    expected = load_file(dense / "model.safetensors")
    for place in (path, path / "flax_model.msgpack.index.json"):
        with open_source(place) as source:
            assert source.kind == "flax" and set(source.tensors) == set(expected)
            assert all(torch.equal(source.tensor(name), expected[name]) for name in expected)
    moezoo.upcycle(path, tmp_path / "out", num_experts=2)
    (path / "flax_model-00002-of-00002.msgpack").unlink()
    with pytest.raises(IndexFileError, match=r"flax_model-00002-of-00002\.msgpack"):
        moezoo.load(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tf_model.h5"], r"TensorFlow's HDF5 weights.*from_tf=True"),
        (["checkpoint", "model.ckpt-1000.index"], "a TensorFlow checkpoint"),
    ],
)
def test_containers_that_are_not_read_are_refused_with_the_way_out(
    names: list[str], message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"some bytes of another container")
    with pytest.raises(CheckpointError, match=message) as caught:
        moezoo.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["google/t5-none", "Qwen/Qwen2.5-0.5B", "org/Llama-3.2-1B"])
def test_a_name_on_the_hub_is_answered_at_once_with_the_way_to_fetch_it(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}: no such file.*hf download"):
        moezoo.upcycle(name, "out", num_experts=2)


def test_safetensors_beside_other_containers_load(tmp_path: Path) -> None:
    path = dense_t5(tmp_path / "dense")
    for name in ("tf_model.h5", "_METADATA"):
        (path / name).write_bytes(b"\x89HDF")
    moezoo.load(path)
    with pytest.raises(CheckpointError, match="HDF5"):
        moezoo.load(path / "tf_model.h5")


def test_an_array_that_no_t5_has_is_named_with_its_file(tmp_path: Path) -> None:
    weights = load_file(dense_t5(tmp_path / "dense") / "model.safetensors")
    (tmp_path / "t5x").mkdir()
    write_t5x(weights, tmp_path / "t5x")
    content = (tmp_path / "t5x/checkpoint").read_bytes()
    (tmp_path / "t5x/checkpoint").write_bytes(content.replace(b"encoder_norm", b"encoder_form"))
    with pytest.raises(TensorMismatch, match=r"t5x: no T5 has an array .*encoder_form"):
        moezoo.load(tmp_path / "t5x")


@pytest.mark.parametrize(
    "component",
    [
        *({"router": name} for name in moezoo.routers.names()),
        *({"experts": name} for name in moezoo.experts.names()),
        {"shared_expert": {"d_ff": 8}},
    ],
    ids=str,
)
def test_models_of_any_component_are_exported_whole_or_refused_by_it(
    component: dict[str, object], tmp_path: Path
) -> None:
    config = moezoo.SwitchConfig(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2, num_experts=4,
        encoder_sparse_layers=(1,), decoder_sparse_layers=(), **component,
    )  # fmt: skip
    model = moezoo.build(config, seed=0)
    moezoo.save(model, tmp_path / "model")
    try:
        export(tmp_path / "model", tmp_path / "out")
    except TensorMismatch as error:
        (name,) = [spec for spec in component.values() if isinstance(spec, str)] or ["shared"]
        assert "conversions do not know the weights of" in str(error) and name in str(error)
        assert name not in ("switch", "top_k", "stacked")
        return
    state, again = model.state_dict(), moezoo.load(tmp_path / "out").state_dict()
    assert set(again) == set(state) and all(torch.equal(again[n], state[n]) for n in state)


@pytest.fixture(params=["local", "transient-global"])
def long_t5(request: pytest.FixtureRequest) -> transformers.LongT5ForConditionalGeneration:
    config = transformers.LongT5Config(
        **SIZES, encoder_attention_type=request.param, local_radius=4, global_block_size=4
    )
    torch.manual_seed(0)
    return transformers.LongT5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("with_config", [True, False])
def test_long_t5_is_refused_by_name(
    with_config: bool, long_t5: transformers.LongT5ForConditionalGeneration, tmp_path: Path
) -> None:
    long_t5.save_pretrained(tmp_path / "long")
    if not with_config:
        (tmp_path / "long/config.json").unlink()
    with pytest.raises(ConfigError, match=r"this is LongT5.*attention.*moezoo\.plug"):
        moezoo.upcycle(tmp_path / "long", tmp_path / "out", num_experts=2)
    assert not (tmp_path / "out").exists()


def test_the_way_out_for_long_t5_works(
    long_t5: transformers.LongT5ForConditionalGeneration,
) -> None:
    with torch.no_grad():
        before = long_t5(ids(), decoder_input_ids=ids()).logits
        made = moezoo.plug(long_t5, "*.DenseReluDense", sparse(num_experts=4))
        after = long_t5(ids(), decoder_input_ids=ids()).logits
    assert len(made) == 4
    assert torch.allclose(after, before, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize(
    "name",
    [
        "encoder.encoder.attention.query.kernel",
        "decoder.decoder.self_attention.query.kernel",
        "decoder.layers.encoder_decoder_attention.out.kernel",
        "encoder.encoder.layers_0.mlp.wi.kernel",
        "encoder.scan.pre_mlp_layer_norm.scale",
    ],
)
def test_a_scanned_t5x_checkpoint_is_refused_by_that_name(name: str, tmp_path: Path) -> None:
    stacked = {"token_embedder.embedding": torch.zeros(8, 4), name: torch.zeros(4, 2, 4)}
    (tmp_path / "checkpoint").write_bytes(packed({"optimizer": {"target": nested(stacked)}}))
    with pytest.raises(TensorMismatch, match="scanned t5x checkpoint.*scan_layers = False"):
        moezoo.load(tmp_path)


def test_another_array_of_a_t5x_checkpoint_is_not_called_scanned(tmp_path: Path) -> None:
    odd = {"encoder.layers_0.oddity.kernel": torch.zeros(4, 4)}
    (tmp_path / "checkpoint").write_bytes(packed({"optimizer": {"target": nested(odd)}}))
    with pytest.raises(TensorMismatch, match="no T5 has an array called"):
        moezoo.load(tmp_path)
