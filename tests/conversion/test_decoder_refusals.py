"""What a sibling cannot hold, and files that lie: one line with file, field and way out."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moezoo
from moezoo.adapters.checkpoint_source import open_checkpoint
from moezoo.adapters.sparse import sparse
from moezoo.adapters.upcycle import upcycle
from moezoo.adapters.upcycle.calibration import Calibration
from moezoo.adapters.upcycle.merge import merge
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.adapters.verify import verify
from moezoo.cli import main
from moezoo.errors import MoezooError
from tests.conversion.decoders import SIZES, dense_decoder, edit_config, ids, logits, relative

_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
# A source by family and options, the recipe, and what the line must say.
REFUSALS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "a bias that Mixtral has no place for": (
        "llama", {"attention_bias": True}, {},
        ("config.json", "mixtral has no attention_bias", "moezoo.plug"),
    ),
    "a bias of the MLP": ("llama", {"mlp_bias": True}, {}, ("mixtral has no mlp_bias",)),
    "a bias of Granite's MLP": ("granite", {"mlp_bias": True}, {}, ("has no mlp_bias",)),
    "a bias of Ernie": ("ernie4_5", {"use_bias": True}, {}, ("ernie4_5_moe has no use_bias",)),
    "a bias of Seed-OSS": (
        "seed_oss", {"attention_out_bias": True}, {}, ("qwen2_moe has no attention_out_bias",),
    ),
    "norms of Cohere's heads": ("cohere", {"use_qk_norm": True}, {}, ("has no use_qk_norm",)),
    "half a head that rotates": (
        "phi3", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}, {},
        ("mixtral has no partial_rotary_factor but 1.0", "found 0.5"),
    ),
    "factors for long texts": (
        "phi3", {"rope_parameters": {**_ROPE, "rope_type": "longrope", "short_factor": [1.0, 1.5],
                                     "long_factor": [2.0, 4.0]}}, {},
        ("mixtral has no rope_type but 'default'", "found 'longrope'"),
    ),
    "windows in some layers of Qwen3": (
        "qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {},
        ("config.json", "qwen3_moe has the same attention in all layers", "moezoo.plug"),
    ),
    "windows of Olmo3": (
        "olmo3", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, {},
        ("flex_olmo has no sliding windows", "sliding_attention"),
    ),
    "a dense layer in a Mixtral": (
        "llama", {}, {"layers": "odd"}, ("mixtral has experts in all layers", "layers='all'"),
    ),
    "layers that Ernie cannot place": (
        "ernie4_5", {"num_hidden_layers": 4}, {"layers": [0, 3]}, ("every n-th layer",),
    ),
    "a first layer in a DeepSeek-V3": (
        "youtu", {}, {"layers": [0]}, ("deepseek_v3 has experts in all layers from one on",),
    ),
    "norms after the parts of HyperCLOVA X": (
        "hyperclovax", {"use_post_norm": True}, {},
        ("config.json", "granitemoe has no use_post_norm", "moezoo.plug"),
    ),
    "a bias of SmolLM3's MLP": ("smollm3", {"mlp_bias": True}, {}, ("has no mlp_bias",)),
    "layers of an encoder": (
        "llama", {}, {"layers": "enc=1;dec=all"}, ("a decoder has no encoder", "layers alone"),
    ),
    "one expert, where the best two of a group count": (
        "youtu", {}, {"num_experts": 1}, ("deepseek_v3 cannot choose among fewer", ">= 2, found 1"),
    ),
    "slices beside a shared MLP": ("youtu", {}, {"init": "split"}, ("one width for experts",)),
    "moezoo's own layout": (
        "llama", {}, {"layout": "moezoo"},
        ("moezoo's own layout holds T5s", "moezoo.plug(model,", "moezoo.save"),
    ),
    "a router that is not theirs": (
        "llama", {}, {"router": "switch"}, ("normalise the weights", "top_k"),
    ),
    "more choices than experts": (
        "llama", {}, {"router": {"name": "top_k", "k": 5}}, ("the router's k is out of range",),
    ),
    "a capacity": ("llama", {}, {"capacity": "switch"}, ("mixtral drops no tokens", "dropless")),
    "slices where all tokens pass as much": (
        "hunyuan_v1_dense", {}, {"init": "split"}, ("one width for experts", "init='copy'"),
    ),
}  # fmt: skip


def refused(source: Path, target: Path, **recipe: Any) -> str:
    """The line with which an upcycling is refused; nothing is written."""
    before = sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(MoezooError) as caught:
        upcycle(source, target, **{"num_experts": 4, **recipe})
    assert sorted(path.name for path in target.parent.iterdir()) == before
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_sibling_cannot_hold_is_refused_by_name(case: str, tmp_path: Path) -> None:
    family, options, recipe, words = REFUSALS[case]
    source = dense_decoder(tmp_path / "dense", family, **options)
    line = refused(source, tmp_path / "moe", **recipe)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("family", "fields", "line"),
    [
        ("internlm3", {"qkv_bias": True}, "mixtral has no qkv_bias"),
        ("hyperclovax", {"use_post_norm": ...}, "granitemoe has no use_post_norm"),
        ("lfm2", {"tie_embedding": False}, "lfm2_moe has no tie_embedding but True"),
        ("lfm2", {"block_multiple_of": 0}, "bad block_multiple_of"),
        ("youtu", {"v_head_dim": "5"}, "bad v_head_dim"),
        ("smollm3", {"no_rope_layers": [1]}, "bad no_rope_layers; expected a list of 2 of 0, 1"),
        ("qwen3_5_text", {"layer_types": "full"}, "bad layer_types; expected a list of 2"),
        ("hyperclovax", {"logits_scaling": 0}, "bad logits_scaling; expected > 0"),
        ("internlm3", {"bias": True}, "mixtral has no bias"),
        ("internlm3", {"attention_bias": True}, "mixtral has no attention_bias"),
        ("phi3", {"partial_rotary_factor": 0.75}, "has no partial_rotary_factor but 1.0"),
        ("phi3", {"rope_parameters": ..., "rope_scaling": {"type": "su"}}, "has no type but"),
    ],
)
def test_a_field_is_refused_by_any_name_that_files_have_for_it(
    family: str, fields: dict[str, Any], line: str, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    edit_config(source, **fields)
    assert line in refused(source, tmp_path / "moe")


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"max_window_layers": 1})],
)
def test_the_way_out_works(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """What a refusal names: `moezoo.plug` on the model that transformers loads."""
    windows = {"use_sliding_window": True, "sliding_window": 4} if family == "qwen3" else {}
    source = dense_decoder(tmp_path / "dense", family, **options, **windows)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids()).logits
        moezoo.plug(model, "model.layers.*.mlp", sparse(4))
        assert relative(model(ids()).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "where"),
    [("exaone4", "mlp"), ("glm4", "mlp"), ("phi3", "mlp"), ("lfm2", "feed_forward"),
     ("gemma3_text", "mlp")],
)  # fmt: skip
def test_models_without_a_sibling_are_plugged(model_type: str, where: str) -> None:
    """As docs/stacks.md says."""
    options = {"full_attn_idxs": [1]} if model_type == "lfm2" else {"head_dim": 8}
    config = AutoConfig.for_model(model_type, **SIZES, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        expected = model(ids()).logits
        moezoo.plug(model, f"model.layers.*.{where}", sparse(4))
        assert relative(model(ids()).logits, expected) < 1e-5


def _fields(path: Path, **changes: Any) -> None:
    edit_config(path, **changes)


def _weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = load_file(path / "model.safetensors")
    change(held)
    save_file(held, path / "model.safetensors", {"format": "pt"})


LIES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a wrong width": (
        lambda p: _fields(p, intermediate_size=40),
        ("_proj.weight", "wrong shape", "intermediate_size 40", "correct it"),
    ),
    "too few layers": (
        lambda p: _fields(p, num_hidden_layers=1), ("unexpected tensor 'model.layers.1.",),
    ),
    "too many layers": (
        lambda p: _fields(p, num_hidden_layers=3),
        ("lacks", "model.layers.2", "num_hidden_layers 3", "correct it"),
    ),
    "other tables": (
        lambda p: _fields(p, vocab_size=64), ("lm_head.weight", "[64, 16]", "vocab_size 64"),
    ),
    "no config": (
        lambda p: (p / "config.json").unlink(),
        ("Llama or its kin", "Put its config.json beside it"),
    ),
    "absurdly many layers": (lambda p: _fields(p, num_hidden_layers=10**9), ("num_hidden_layers",)),
    "other heads": (
        lambda p: _fields(p, num_key_value_heads=4), ("k_proj", "num_key_value_heads 4"),
    ),
    "a head that it ties": (
        lambda p: _fields(p, tie_word_embeddings=True),
        ("config.json", "tie_word_embeddings is true", "lm_head.weight differs"),
    ),
    "no head": (
        lambda p: _weights(p, lambda w: w.pop("lm_head.weight")),
        ("lacks 'lm_head.weight'", "config.json says tie_word_embeddings False: correct it"),
    ),
    "ties that are text": (
        lambda p: _fields(p, tie_word_embeddings="no"),
        ("config.json", "bad tie_word_embeddings; expected true or false, found 'no'"),
    ),
    "norms that are text": (lambda p: _fields(p, rms_norm_eps="1"), ("bad rms_norm_eps",)),
    "RoPE that is text": (
        lambda p: _fields(p, rope_parameters="yarn"), ("bad rope_parameters; expected an object",),
    ),
    "a base of RoPE that is text": (
        lambda p: _fields(p, rope_parameters={"rope_type": "default", "rope_theta": "1e4"}),
        ("bad rope_theta; expected a number, found '1e4'",),
    ),
    "attention that nobody has": (
        lambda p: _fields(p, layer_types=["full_attention", "chunked"]),
        ("bad layer_types; expected a list of 2 of full_attention", "'chunked'"),
    ),
    "a size that is text": (lambda p: _fields(p, hidden_size="16"), ("bad hidden_size", "'16'")),
    "a size that is missing": (
        lambda p: _fields(p, vocab_size=...), ("config.json has no 'vocab_size'",),
    ),
    "an activation that nobody has": (
        lambda p: _fields(p, hidden_act="snake"), ("hidden_act", "snake"),
    ),
    "quantised weights": (
        lambda p: _fields(p, quantization_config={"quant_method": "gptq"}), ("quantised (gptq)",),
    ),
    "an adapter": (
        lambda p: _weights(p, lambda w: w.update({"model.q.lora_A.weight": torch.ones(2, 2)})),
        ("adapter (LoRA)", "merge_and_unload"),
    ),
    "a stranger": (
        lambda p: _weights(p, lambda w: w.update({"model.norm.wieght": w.pop("model.norm.weight")})
        ),
        ("unexpected tensor 'model.norm.wieght'", "Did you mean 'model.norm.weight'?"),
    ),
    "whole numbers": (
        lambda p: _weights(p, lambda w: w.update({"model.norm.weight": torch.ones(16).int()})),
        ("model.norm.weight", "dtype"),
    ),
    "another family": (lambda p: _fields(p, model_type="bert"), ("bert", "plug")),
}  # fmt: skip


def _sharded(path: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="8KB")
    return sorted(path.glob("*.safetensors"))


def _cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a shard that is missing": (
        lambda p: _sharded(p)[1].unlink(),
        ("model.safetensors.index.json", "model-00002-of-0000", "missing", "Download the whole"),
    ),
    "a shard that ends early": (
        lambda p: _cut(_sharded(p)[1], -8),
        ("model-00002-of-0000", "passes the end of the file: truncated", "Download it again"),
    ),
    "a file that ends early": (
        lambda p: _cut(p / "model.safetensors", -8),
        ("model.safetensors: tensor 'model.", "truncated", "Download it again"),
    ),
    "a header that ends early": (
        lambda p: _cut(p / "model.safetensors", 50), ("header's length", "Download it again"),
    ),
    "a file without content": (
        lambda p: _cut(p / "model.safetensors", 0), ("too short", "0 bytes", "Download it again"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_broken_are_named_before_anything_is_written(
    case: str, tmp_path: Path
) -> None:
    change, words = BROKEN[case]
    source = dense_decoder(tmp_path / "dense")
    change(source)
    line = refused(source, tmp_path / "moe")
    for word in (str(source), *words):
        assert word in line


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("youtu", {"q_lora_rank": None}),
        ("qwen3_5_text", {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_no_other_name_is_proposed_where_it_is_the_config_that_lies(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense", family)
    edit_config(source, **fields)
    line = refused(source, tmp_path / "moe")
    assert "unexpected tensor 'model.layers.0." in line
    assert "Did you mean" not in line
    assert "config.json says hidden_size 16" in line


@pytest.mark.parametrize("case", LIES)
def test_a_config_that_lies_is_refused_before_anything_is_written(
    case: str, tmp_path: Path
) -> None:
    change, words = LIES[case]
    source = dense_decoder(tmp_path / "dense")
    change(source)
    line = refused(source, tmp_path / "moe")
    assert str(source) in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        (
            "gemma",
            {"head_dim": 4},
            ("docs/stacks.md", 'moezoo.plug(model, "*.mlp", moezoo.sparse(8))'),
        ),
        ("gpt2", {}, ("docs/stacks.md", 'moezoo.plug(model, "*.mlp", moezoo.sparse(8))')),
        ("olmoe", {}, ("A mixture of experts already", 'experts_implementation="moezoo"')),
    ],
)
def test_a_decoder_without_a_row_is_told_the_way_out(
    model_type: str, options: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    line = refused(tmp_path / "source", tmp_path / "moe")
    for word in (f"{tmp_path / 'source'}/config.json", f"model_type '{model_type}'", *words):
        assert word in line


@pytest.mark.parametrize("way", ["live", "load"])
def test_a_decoder_in_memory_is_told_to_go_by_its_directory(way: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    with pytest.raises(MoezooError, match=r"the decoder Llama\. moezoo\.upcycle\(DIR, OUT"):
        if way == "load":
            moezoo.load(source)
        else:
            upcycle(AutoModelForCausalLM.from_pretrained(source), num_experts=2)


@pytest.mark.parametrize(
    ("family", "options", "field"),
    [("llama", {"intermediate_size": 32}, "intermediate_size"), ("llama", {"hidden_act": "gelu"},
     "hidden_act"), ("mistral", {}, "model_type"), ("qwen2", {}, "model_type")],
)  # fmt: skip
def test_models_of_several_shapes_are_not_merged(
    family: str, options: dict[str, Any], field: str, tmp_path: Path
) -> None:
    one = dense_decoder(tmp_path / "one")
    other = dense_decoder(tmp_path / "other", family, **options)
    with pytest.raises(MoezooError) as caught:
        merge([one, other], tmp_path / "merged", Recipe(2, init="branches"))
    line = str(caught.value)
    for word in (f"{other}/config.json", f"differ in shape or kind: {field}", str(one),
                 "fine-tuned from one"):  # fmt: skip
        assert word in line
    assert not (tmp_path / "merged").exists()


def test_a_sparse_source_is_told_to_grow(tmp_path: Path) -> None:
    for family in ("llama", "granite"):
        source = dense_decoder(tmp_path / family, family)
        upcycle(source, tmp_path / f"{family}-moe", num_experts=2)
        line = refused(tmp_path / f"{family}-moe", tmp_path / "again")
        assert "a mixture of experts already" in line
        assert "moezoo grow" in line


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("num_local_experts", 10**9, "wrong shape"),
        ("num_local_experts", 1, "more choices than experts"),
        ("num_experts_per_tok", 0, "bad num_experts_per_tok"),
        ("intermediate_size", 7, "wrong shape"),
    ],
)
def test_a_sparse_config_that_lies_is_refused(
    field: str, value: int, word: str, tmp_path: Path
) -> None:
    upcycle(dense_decoder(tmp_path / "dense", "granite"), tmp_path / "moe", num_experts=4)
    edit_config(tmp_path / "moe", **{field: value})
    with pytest.raises(MoezooError, match=word):
        open_checkpoint(tmp_path / "moe")


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("qwen3", "norm_topk_prob", False), ("ernie4_5", "moe_num_shared_experts", 2)],
)
def test_sparse_layers_of_another_form_are_refused_by_field(
    family: str, field: str, value: Any, tmp_path: Path
) -> None:
    upcycle(dense_decoder(tmp_path / "dense", family), tmp_path / "moe", num_experts=2)
    for found in (value, ...):  # as its class assumes where the file is silent
        edit_config(tmp_path / "moe", **{field: found})
        with pytest.raises(MoezooError, match=f"sparse layers with this {field}"):
            open_checkpoint(tmp_path / "moe")


def test_a_classifier_is_left_out_when_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=True, num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    line = refused(tmp_path / "dense", tmp_path / "moe")
    assert "no head such as 'score.weight'" in line
    assert "--drop-heads" in line
    upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=2, drop_heads=True)
    assert logits(tmp_path / "moe").shape == (2, 20, 61)


def test_a_fused_model_in_pickles_is_refused_with_the_way_out(tmp_path: Path) -> None:
    upcycle(dense_decoder(tmp_path / "dense", "granite"), tmp_path / "moe", num_experts=2)
    held = load_file(tmp_path / "moe" / "model.safetensors")
    (tmp_path / "moe" / "model.safetensors").unlink()
    torch.save(held, tmp_path / "moe" / "pytorch_model.bin")
    with pytest.raises(MoezooError, match="Save it as safetensors"):
        open_checkpoint(tmp_path / "moe")


def test_a_dense_source_in_pickles_is_read(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense", "qwen2")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    expected = logits(source)
    (source / "model.safetensors").unlink()
    upcycle(source, tmp_path / "moe", num_experts=2)
    assert relative(logits(tmp_path / "moe"), expected) < 1e-5


def test_the_fourth_level_alone_asks_for_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dense_decoder(tmp_path / "dense")
    upcycle(source, tmp_path / "moe", num_experts=2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verify(tmp_path / "moe", source, levels=(1, 2, 3, 5)).passed
    with pytest.raises(MoezooError, match=r"needs transformers.*--levels 1,2,3,5"):
        verify(tmp_path / "moe", source, levels=(4,))
    sample = Calibration([[5, 9], [33]], experts=[0, 1])
    line = refused(source, tmp_path / "aimed", num_experts=2, router_init="prompts",
                   calibration=sample)  # fmt: skip
    assert "needs transformers" in line
    assert "--inputs embeddings" in line
    sample = dataclasses.replace(sample, inputs="embeddings")
    upcycle(source, tmp_path / "aimed", num_experts=2, router_init="prompts", calibration=sample)


def test_a_transformers_that_does_not_know_a_class_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one does that is older than the class."""
    source = dense_decoder(tmp_path / "dense", "iquestcoder", head_dim=4)
    monkeypatch.delitem(CONFIG_MAPPING._mapping, "iquestcoder")
    words = ["upcycle", str(source), str(tmp_path / "moe"), "--experts", "2"]
    assert main([*words, "--verify"]) == 3
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    for word in (str(source), "cannot load it", "iquestcoder", "newer", "--levels 1,2,3,5"):
        assert word in line
    assert not (tmp_path / "moe").exists()
    assert main(words) == 0


@pytest.mark.parametrize(("level", "name"), [(1, "w3"), (2, "w1"), (3, "w2"), (4, "gate_proj")])
def test_verification_sees_what_was_changed(level: int, name: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    upcycle(source, tmp_path / "moe", num_experts=2)
    held = load_file(tmp_path / "moe" / "model.safetensors")
    if level == 1:
        held.pop(f"model.layers.1.block_sparse_moe.experts.1.{name}.weight")
        save_file(held, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
        with pytest.raises(MoezooError, match="w3"):
            verify(tmp_path / "moe", source, levels=(level,))
        return
    for key in held:
        if name in key or (level == 4 and "q_proj" in key):
            held[key] = held[key] * 1.01
    save_file(held, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    assert not verify(tmp_path / "moe", source, levels=(level,)).passed


def test_another_config_fails_the_first_level(tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    upcycle(source, tmp_path / "moe", num_experts=2)
    values = json.loads((tmp_path / "moe" / "config.json").read_text())
    edit_config(tmp_path / "moe", rms_norm_eps=values["rms_norm_eps"] * 2)
    found = verify(tmp_path / "moe", source, levels=(1,))
    assert not found.passed
    assert "config.json disagrees with the recipe in rms_norm_eps" in str(found.results[0].summary)
