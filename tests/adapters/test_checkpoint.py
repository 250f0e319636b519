"""Loading and saving: round trips over the family, strict loading in transformers, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from tests.models.tiny import source, tiny
from tests.parity.test_families import FAMILIES, pair

transformers = pytest.importorskip("transformers")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(source(2, 7), decoder_input_ids=source(2, 5, seed=1))
    return out.logits


def hf_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=source(2, 7), decoder_input_ids=source(2, 5, seed=1)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_loads_with_the_same_logits(family: str, tmp_path: Path) -> None:
    reference, _ = pair(family)
    reference.save_pretrained(tmp_path)
    overrides: dict[str, Any] = {}
    if family == "switch that drops":
        overrides = {"capacity": {"name": "transformers", "limit": 2}}
    model = moezoo.load(tmp_path, **overrides)
    torch.testing.assert_close(logits(model), hf_logits(reference), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_moezoo_saves_loads_strictly_in_transformers(family: str, tmp_path: Path) -> None:
    reference, model = pair(family)
    moezoo.save(model, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] in ("t5", "umt5", "switch_transformers")
    kind = getattr(transformers, values["architectures"][0])
    loaded, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(hf_logits(loaded), hf_logits(reference), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"feed_forward_proj": "gated-silu"},
        {"router": {"name": "top_k", "k": 2}, "encoder_sparse_layers": (0,)},
        {"tie_word_embeddings": False, "router_bias": True, "position_bias_every_layer": True},
    ],
    ids=str,
)
def test_models_beyond_the_hugging_face_layout_round_trip(
    overrides: dict[str, Any], shard: str | None, tmp_path: Path
) -> None:
    model = tiny(**overrides)
    moezoo.save(model, tmp_path / "out", max_shard_size=shard)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == "moezoo"
    again = moezoo.load(tmp_path / "out")
    assert again.config == model.config
    expected = model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in again.state_dict().items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or shard
    with pytest.raises(moezoo.MoezooError, match="cannot hold"):
        moezoo.save(model, tmp_path / "hf", layout="huggingface")


@pytest.mark.parametrize("router", moezoo.routers.names())
def test_a_model_with_any_router_round_trips(router: str, tmp_path: Path) -> None:
    kind = moezoo.routers.registry.get(router)
    model = tiny(router=router, decoder_sparse_layers="none", allow_noncausal=True)
    moezoo.save(model, tmp_path / "out")
    again = moezoo.load(tmp_path / "out")
    expected = model.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(t, expected[n]) for n, t in again.state_dict().items())
    if kind.deterministic and router != "random":
        torch.testing.assert_close(logits(again), logits(model))


def test_switchs_layout_keeps_what_training_needs_besides(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "capacity": {"name": "switch", "factor": 2.0},
        "group": "sequence",
        "experts": {"name": "stacked", "dropout": 0.4},
    }
    model = tiny(**settings)
    moezoo.save(model, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == "switch_transformers"
    again = moezoo.load(tmp_path / "out").config.to_dict()
    assert {name: again[name] for name in settings} == settings
    loaded = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "out"
    )
    torch.testing.assert_close(hf_logits(loaded), logits(model.eval()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("own", [[], {"router": "soft"}, {"capacity": 3}])
def test_a_foreign_moezoo_config_is_refused(own: Any, tmp_path: Path) -> None:
    moezoo.save(tiny(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moezoo_config": own}))
    with pytest.raises(moezoo.MoezooError, match="moezoo_config|capacity"):
        moezoo.load(tmp_path / "out")


@pytest.mark.parametrize("task", ["conditional_generation", "model", "encoder"])
def test_every_task_saves_and_loads(task: str, tmp_path: Path) -> None:
    model = tiny(task)
    moezoo.save(model, tmp_path / "out")
    again = moezoo.load(tmp_path / "out", task=task)
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_the_encoder_of_a_whole_checkpoint_loads_alone_and_not_the_other_way(
    tmp_path: Path,
) -> None:
    moezoo.save(tiny(), tmp_path / "whole")
    encoder = moezoo.load(tmp_path / "whole", task="encoder")
    moezoo.save(encoder, tmp_path / "encoder")
    assert type(moezoo.load(tmp_path / "encoder")) is moezoo.SwitchEncoderModel
    with pytest.raises(moezoo.MoezooError, match="encoder only"):
        moezoo.load(tmp_path / "encoder", task="conditional_generation")


def test_a_prefixed_single_file_without_config_loads_as_an_encoder(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    reference = transformers.T5EncoderModel(config).eval()
    prefix = "text_encoders.t5xxl.transformer."
    state = {prefix + n: t.clone() for n, t in reference.state_dict().items()}
    state["unet.conv.weight"] = torch.zeros(2)
    state = {n: t for n, t in state.items() if "embed_tokens" not in n}
    safetensors.save_file(state, tmp_path / "all.safetensors")
    model = moezoo.load(tmp_path / "all.safetensors")
    expected = reference(input_ids=source()).last_hidden_state
    torch.testing.assert_close(model(source()).last_hidden_state, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_pytorch_bin_files_load(shard: str, tmp_path: Path) -> None:
    reference, _ = pair("t5")
    state = reference.state_dict()
    reference.config.save_pretrained(tmp_path)
    if shard == "10GB":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(state)
        files = {"pytorch_model-00001-of-00002.bin": names[::2]}
        files["pytorch_model-00002-of-00002.bin"] = names[1::2]
        for file, group in files.items():
            torch.save({n: state[n] for n in group}, tmp_path / file)
        index = {"metadata": {}, "weight_map": {n: f for f, g in files.items() for n in g}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(
        logits(moezoo.load(tmp_path)), hf_logits(reference), atol=1e-4, rtol=0
    )


def test_dtype_and_device_are_honoured(tmp_path: Path) -> None:
    moezoo.save(tiny(), tmp_path / "out")
    half = moezoo.load(tmp_path / "out", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in half.parameters())
    moezoo.save(half, tmp_path / "half")
    assert {p.dtype for p in moezoo.load(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_saving_refuses_an_existing_target_and_overwrites_when_told(tmp_path: Path) -> None:
    moezoo.save(tiny(), tmp_path / "out")
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(moezoo.MoezooError, match="exists"):
        moezoo.save(tiny(), tmp_path / "out")
    assert (tmp_path / "out" / "note.txt").exists()
    moezoo.save(tiny(), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "note.txt").exists()
    with pytest.raises(moezoo.MoezooError, match="only moezoo models"):
        moezoo.save(torch.nn.Linear(2, 2), tmp_path / "linear")


def broken(tmp_path: Path, *, drop: str = "", shape: str = "", nan: str = "", extra: str = "",
           **fields: Any) -> Path:  # fmt: skip
    """A T5 checkpoint with one thing wrong."""
    from safetensors.torch import load_file, save_file

    reference, _ = pair("t5")
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {n: t.clone() for n, t in load_file(path).items()}
    if drop:
        del state[drop]
    if shape:
        state[shape] = state[shape].t().contiguous()
    if nan:
        state[nan].view(-1)[0] = float("nan")
    if extra:
        state[extra] = torch.zeros(2, 2)
    save_file(state, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | fields
    config = {k: v for k, v in config.items() if v != "(gone)"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
NORM = "encoder.block.1.layer.1.layer_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": WO}, WO),
        ({"shape": WO}, WO),
        ({"nan": NORM}, NORM),
        ({"extra": "encoder.block.0.layer.5.weight"}, "layer.5"),
        ({"extra": "encoder.block.9.layer.0.layer_norm.weight"}, "block.9"),
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": "(gone)", "architectures": "(gone)"}, "model_type"),
        ({"model_type": "longt5"}, "LongT5"),
        ({"d_model": "wide"}, "d_model"),
        ({"d_model": -4}, "d_model"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"d_ff": "(gone)"}, "d_ff"),
        ({"d_ff": 41}, "d_ff|shape"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"feed_forward_proj": "tanh", "dense_act_fn": "(gone)"}, "feed_forward_proj"),
        ({"dense_act_fn": "tanh"}, "dense_act_fn"),
        ({"feed_forward_proj": "gated-gelu", "is_gated_act": True}, "is_gated_act"),
        ({"dropout_rate": 2.0}, "dropout_rate"),
    ],
    ids=str,
)
def test_a_bad_checkpoint_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(moezoo.MoezooError, match=message) as caught:
        moezoo.load(broken(tmp_path, **change))
    assert str(tmp_path) in str(caught.value), "the message names the file"


def test_non_finite_weights_load_when_allowed(tmp_path: Path) -> None:
    assert moezoo.load(broken(tmp_path, nan=NORM), allow_nonfinite=True) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    broken(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(moezoo.MoezooError, match="config.json"):
        moezoo.load(tmp_path)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(moezoo.MoezooError, match="nowhere"):
        moezoo.load(tmp_path / "nowhere")


@pytest.mark.parametrize("order", ["as moezoo writes", "as transformers writes"])
def test_experts_in_a_row_in_the_file_are_loaded_without_a_copy(order: str, tmp_path: Path) -> None:
    reference, model = pair("switch")
    if order == "as moezoo writes":
        moezoo.save(model, tmp_path / "out")
    else:
        reference.save_pretrained(tmp_path / "out")
    loaded = moezoo.load(tmp_path / "out", capacity="dropless")
    torch.testing.assert_close(logits(loaded), hf_logits(reference), atol=1e-4, rtol=0)
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if str(tmp_path) in line]
    stacks = [p for name, p in loaded.named_parameters() if ".experts.w" in name]
    mapped = [any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in spans) for p in stacks]
    assert stacks and set(mapped) == {order == "as moezoo writes"}


@pytest.mark.parametrize("device", ["quantum", 3.5, "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: object, tmp_path: Path) -> None:
    _, model = pair("switch")
    moezoo.save(model, tmp_path / "out")
    with pytest.raises(moezoo.MoezooError, match="no device"):
        moezoo.load(tmp_path / "out", device=device)
    with pytest.raises(moezoo.MoezooError, match="no device"):
        moezoo.build("t5-small", device=device)


def test_training_a_loaded_model_leaves_its_file_as_it_was(tmp_path: Path) -> None:
    _, model = pair("switch")
    moezoo.save(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    loaded = moezoo.load(tmp_path / "out", capacity="dropless").train()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1, fused=True)
    loaded(source(2, 7), labels=source(2, 5, seed=1)).loss.backward()
    optimizer.step()
    changed = zip(loaded.parameters(), model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in changed)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_file_that_holds_a_learned_number_without_a_dimension_is_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny(router="cosine", router_losses={})
    moezoo.save(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("temperature")]:
        assert tensors[name].shape == (1,)
        tensors[name] = tensors[name].view(())
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = moezoo.load(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)
