"""Every dense decoder becomes its sparse sibling of transformers, and computes what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.fused import part_name, slice_name
from moezoo.adapters.hf import register
from moezoo.adapters.plan import make_plan
from moezoo.adapters.tensor_files import TensorFile, TensorPlan
from moezoo.adapters.upcycle import downcycle, upcycle
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.verify import verify
from moezoo.errors import MoezooError
from tests.conversion.decoders import (
    FAMILIES,
    dense_decoder,
    edit_config,
    ids,
    loaded,
    logits,
    relative,
)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def config_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "config.json").read_text())
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sibling_computes_what_the_dense_model_did_and_goes_back(
    family: str, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    report = upcycle(source, tmp_path / "moe", num_experts=4)
    dense, sparse = loaded(source), loaded(tmp_path / "moe")
    assert sparse.config.model_type == config_of(tmp_path / "moe")["model_type"] != "llama"
    with torch.no_grad():
        assert relative(sparse(ids()).logits, dense(ids()).logits) < 1e-5
    limits = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    torch.testing.assert_close(
        sparse.generate(ids(5), **limits), dense.generate(ids(5), **limits), rtol=0, atol=0
    )
    assert verify(tmp_path / "moe", source).passed
    assert report.plan.streams
    assert report.plan.parameters == sum(t.numel() for t in tensors(tmp_path / "moe").values())
    downcycle(tmp_path / "moe", tmp_path / "back")
    before, after = tensors(source), tensors(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    restored = config_of(tmp_path / "back")
    assert restored.pop("moezoo_provenance")["operation"] == "downcycle"
    assert restored == config_of(source)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == b'{"bytes": "carried"}\n'


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "hunyuan_v1_dense", "phi3"])
def test_half_precision_is_carried_bit_for_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family, dtype=dtype)
    upcycle(source, tmp_path / "moe", num_experts=2)
    made, before = tensors(tmp_path / "moe"), tensors(source)
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    # In float32, so that the weights alone decide and not the order of sums.
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    after = downcycle(tmp_path / "moe")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("qwen3", "1"),
        ("qwen2", [0]),
        ("cohere2", "last:1"),
        ("cohere", [1]),
        ("ernie4_5", "every:2"),
        ("youtu", "last:1"),
        ("lfm2", "last:1"),
    ],
)
def test_siblings_with_dense_layers_take_any_placement(
    family: str, layers: Any, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family, num_hidden_layers=2)
    upcycle(source, tmp_path / "moe", num_experts=2, layers=layers)
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    with open_checkpoint(tmp_path / "moe") as made:
        assert len(made.config.decoder_sparse) == 1
    assert verify(tmp_path / "moe", source, levels=(1, 2, 3)).passed


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_any_number_of_choices_is_exact(family: str, k: int, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    upcycle(source, tmp_path / "moe", num_experts=4, router={"name": "top_k", "k": k})
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    assert verify(tmp_path / "moe", source, levels=(1, 2, 3, 5)).passed


@pytest.mark.parametrize("family", ["mistral", "qwen2", "granite"])
def test_slices_of_the_mlp_add_up_to_it(family: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", family, intermediate_size=64)
    upcycle(source, tmp_path / "moe", num_experts=4, init="split")
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    assert verify(tmp_path / "moe", source).passed
    after = downcycle(tmp_path / "moe")
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors(source).items())


@torch.no_grad()
def test_odd_widths_run_where_transformers_kernel_refuses_them(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", intermediate_size=20, dtype=torch.bfloat16)
    upcycle(source, tmp_path / "moe", num_experts=4, init="split")
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(ids())
    register()
    for way in ("moezoo", "eager"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation=way)
        assert relative(model(ids()).logits.float(), logits(source)) < 5e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
@pytest.mark.parametrize("init", ["noise:0.5", "drop:0.5"])
def test_other_initialisations_change_experts_and_nothing_that_is_shared(
    family: str, init: str, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    upcycle(source, tmp_path / "copy", num_experts=2)
    upcycle(source, tmp_path / "moe", num_experts=2, init=init)
    one, other = tensors(tmp_path / "copy"), tensors(tmp_path / "moe")
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed
    assert all("experts" in name or "linear" in name for name in changed)
    assert verify(tmp_path / "moe", source, levels=(1, 2, 3)).passed


def test_what_lfm2_adds_to_a_sum_is_made_up_for_in_many_layers(tmp_path: Path) -> None:
    source = dense_decoder(
        tmp_path / "dense", "lfm2", num_hidden_layers=16, layer_types=["conv", "full_attention"] * 8
    )
    upcycle(source, tmp_path / "moe", num_experts=8, router={"name": "top_k", "k": 1})
    assert relative(logits(tmp_path / "moe"), logits(source)) < 5e-6
    assert verify(tmp_path / "moe", source).passed
    edit_config(tmp_path / "moe", routed_scaling_factor=1.1)
    with pytest.raises(MoezooError, match="sparse layers with this routed_scaling_factor"):
        open_checkpoint(tmp_path / "moe")


def test_a_silent_old_config_means_what_its_class_assumes(tmp_path: Path) -> None:
    """As transformers 4 wrote it: RoPE at the top, no head_dim, no layer types, defaults left out;
    the sibling's class assumes other values for all of these.
    """
    for family, gone in (
        ("llama", ("head_dim", "rms_norm_eps", "tie_word_embeddings")),
        ("qwen2", ("layer_types", "rms_norm_eps", "max_window_layers")),
        ("olmo2", ("rms_norm_eps", "tie_word_embeddings", "attention_bias")),
    ):
        options = {"rms_norm_eps": 1e-5 if family == "olmo2" else 1e-6}
        source = dense_decoder(tmp_path / family, family, num_key_value_heads=4, **options)
        old = dict.fromkeys((*gone, "rope_parameters", "dtype", "transformers_version"), ...)
        edit_config(source, **old, torch_dtype="float32", rope_scaling=None)
        edit_config(source, rope_theta=20_000.0 if family == "qwen2" else ...)
        upcycle(source, tmp_path / f"{family}-moe", num_experts=2)
        assert relative(logits(tmp_path / f"{family}-moe"), logits(source)) < 1e-5
        downcycle(tmp_path / f"{family}-moe", tmp_path / f"{family}-back")
        restored = config_of(tmp_path / f"{family}-back")
        assert restored.pop("moezoo_provenance")
        assert restored == config_of(source)  # with torch_dtype, as it was


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
        ("granitemoehybrid", {"layer_types": ..., "layers_block_type": ["mamba", "attention"]}),
        ("lfm2", {"block_ff_dim": 36, "intermediate_size": ..., "tie_embedding": True,
                  "layer_types": ..., "full_attn_idxs": [1]}),
        ("smollm3", {"layer_types": ..., "no_rope_layers": ..., "no_rope_layer_interval": 2}),
        ("youtu", {"head_dim": ..., "qk_head_dim": ..., "initializer_range": ...}),
        ("qwen3_5_text", {"layer_types": ..., "full_attention_interval": 2}),
    ],
)  # fmt: skip
def test_layers_are_what_old_files_call_them(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    edit_config(source, rope_parameters=..., rope_theta=5000.0, **fields)
    upcycle(source, tmp_path / "moe", num_experts=2)
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 3.0}])
def test_a_class_with_rope_scaling_of_its_own_gives_way_to_an_old_file(
    scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    """CWM's class assumes Llama 3's scaling, and every fourth layer without a window."""
    source = dense_decoder(tmp_path / "dense", "cwm", num_hidden_layers=5, layer_types=None)
    gone = dict.fromkeys(("rope_parameters", "layer_types", "transformers_version"), ...)
    edit_config(source, **gone, **({} if scaling is None else {"rope_scaling": scaling}))
    upcycle(source, tmp_path / "moe", num_experts=2)
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    kinds = config_of(tmp_path / "moe")["layer_types"]
    assert [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] == [0, 4]


def test_what_a_dense_class_does_not_read_means_nothing_to_its_sibling(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    edit_config(source, sliding_window=2, router_jitter_noise=0.5, num_local_experts=9)
    upcycle(source, tmp_path / "moe", num_experts=2)
    assert relative(logits(tmp_path / "moe"), logits(source)) < 1e-5
    assert config_of(tmp_path / "moe")["router_jitter_noise"] == 0.0


def test_old_files_keep_their_frequencies_and_a_head_that_repeats(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "llama, scaled and tied")
    held = tensors(source)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(held, source / "model.safetensors", {"format": "pt"})
    upcycle(source, tmp_path / "moe", num_experts=2)
    assert not {"lm_head.weight"} & set(tensors(tmp_path / "moe"))
    after = downcycle(tmp_path / "moe")
    assert set(after) == set(held)
    assert all(torch.equal(tensor, after[name]) for name, tensor in held.items())


@pytest.mark.parametrize("family", ["granite", "granite_swa"])
def test_a_fused_tensor_is_written_whole_whatever_the_shards(family: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    upcycle(source, tmp_path / "one", num_experts=3)
    upcycle(source, tmp_path / "many", num_experts=3, max_shard_size=3000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(one)
    fused = [tensor for tensor in one.values() if tensor.dim() == 3]
    assert {tuple(tensor.shape) for tensor in fused} == {(3, 48, 16), (3, 16, 24)}
    assert verify(tmp_path / "many", source).passed


def test_parts_of_a_fused_tensor_are_found_again_after_a_kill(tmp_path: Path) -> None:
    plans = [TensorPlan(part_name("whole", e, p, 2), "F32", (3, 4)) for e in (0, 1) for p in (0, 1)]
    first = TensorFile(tmp_path / "file", plans)
    content = {plan.name: bytes([number]) * 48 for number, plan in enumerate(plans)}
    first.put(plans[2].name, content[plans[2].name])
    first.abandon()
    again = TensorFile(tmp_path / "file", plans)
    for plan in plans:
        held = again.holds(plan.name, content[plan.name])
        assert held == (plan.name in (plans[0].name, plans[2].name))  # the first is zeros
        if not held:
            again.put(plan.name, content[plan.name])
    again.close()
    (whole,) = load_file(tmp_path / "file").values()
    assert whole.shape == (2, 6, 4)
    assert whole.view(torch.uint8).view(-1)[::48].tolist() == [0, 1, 2, 3]


def test_matrices_of_a_fused_tensor_are_found_again_after_a_kill(tmp_path: Path) -> None:
    """They are of any number of rows, unlike those of experts."""
    plans = [TensorPlan(slice_name("whole", i, 3), "F32", (i + 1, 2)) for i in range(3)]
    first = TensorFile(tmp_path / "file", plans)
    content = {plan.name: bytes([n + 1]) * plan.nbytes for n, plan in enumerate(plans)}
    first.put(plans[2].name, content[plans[2].name])
    first.abandon()
    again = TensorFile(tmp_path / "file", plans)
    for plan in plans:
        if not again.holds(plan.name, content[plan.name]):
            assert plan is not plans[2]
            again.put(plan.name, content[plan.name])
    again.close()
    (whole,) = load_file(tmp_path / "file").values()
    assert whole.shape == (6, 2)
    assert whole.view(torch.uint8)[:, 0].tolist() == [1, 2, 2, 3, 3, 3]


def test_memory_does_not_grow_with_the_model_and_no_torch_is_needed(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "qwen2", intermediate_size=4096, hidden_size=64)
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint, Recipe(8))
        from moezoo.adapters.plan_summary import summary

        facts = summary(plan, checkpoint)
    assert facts["streams"]
    assert facts["peak_memory"] <= 64 << 20
    assert facts["layout"] == "qwen2_moe"
    shared = 3 * 64 * 4096 * 2
    assert plan.active_parameters < plan.parameters - shared


def test_metadata_and_card_tell_how_it_was_made(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "qwen2")
    upcycle(source, tmp_path / "moe", num_experts=2)
    made = config_of(tmp_path / "moe")["moezoo_provenance"]
    assert made["source_config"] == config_of(source)
    assert made["wo_scale"] == 0.5
    with safe_open(tmp_path / "moe" / "model.safetensors", "pt") as file:
        wide = {"name": "normal", "std": 0.02}
        recipe = json.loads(file.metadata()["moezoo"])["recipe"]
        assert recipe == {"num_experts": 2, "router_init": wide}
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "| shared expert | yes |" in card
    assert "library_name: transformers" in card
