"""What directories from a hub hold beside weights, and models of one family as several authors save
them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from moezoo.adapters.upcycle import upcycle
from moezoo.adapters.upcycle.calibration import read_calibration
from moezoo.adapters.upcycle.merge import merge
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.cli import main
from moezoo.errors import MoezooError
from tests.conversion.decoders import dense_decoder, edit_config, loaded

_CARRIED = ["LICENSE.txt", "NOTICE", "USE_POLICY.md", "additional_chat_templates/rag.jinja",
            "chat_template.jinja", "chat_template.json", "qwen.tiktoken", "tekken.json",
            "tokenizer.model", "tokenizer.model.v3", "vocab.bpe"]  # fmt: skip
_CARD = "---\nlicense: other\nlicense_name: 'their-own'\nlicense_link: LICENSE.txt\n---\n# It\n"
_BRANCHES = Recipe(2, init="branches")
# As hubs have them: written by transformers 4, with what their class never reads.
_OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"attention_bias": ..., "mlp_bias": ..., "head_dim": ..., "pretraining_tp": 1}),
    "llama, scaled and tied": ({}, {}),
    "qwen2": ({}, {"layer_types": ..., "sliding_window": 131072, "max_window_layers": 21}),
    "phi3": ({}, {"original_max_position_embeddings": 64, "head_dim": ...}),
    "granite": ({"attention_multiplier": 1.0}, {"attention_multiplier": 1}),
    "lfm2": ({}, {"layer_types": ..., "full_attn_idxs": [1], "block_ff_dim": 36,
                  "intermediate_size": ...}),
    "cohere2": ({}, {"sliding_window_pattern": 2, "layer_types": ...}),
    "granitemoehybrid": ({}, {"time_step_limit": ..., "layer_types": ["mamba", "attention"]}),
}  # fmt: skip


def hub(path: Path) -> Path:
    """A directory as a hub's cache lays it: links into a folder of blobs."""
    blobs, snapshot = path / "models--org--tiny/blobs", path / "models--org--tiny/snapshots/1a2b"
    dense_decoder(blobs)
    for folder in ("additional_chat_templates", "LICENSES"):
        (blobs / folder).mkdir()
    for name in (*_CARRIED, "modeling_own.py", "params.json"):
        (blobs / name).write_text(f"the text of {name}")
    (blobs / "README.md").write_text(_CARD)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    return snapshot


def test_files_of_tokenizer_and_licence_are_carried_and_the_others_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = hub(tmp_path)
    assert main(["plan", str(source), "--experts", "2"]) == 0
    said = capsys.readouterr().out
    assert "files not copied      modeling_own.py, params.json\n" in said
    upcycle(source, tmp_path / "moe", num_experts=2)
    for name in _CARRIED:
        copy = tmp_path / "moe" / name
        assert not copy.is_symlink()
        assert copy.read_text() == f"the text of {name}"
    assert not list((tmp_path / "moe").glob("*.py"))
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "# org/tiny, upcycled to 2 experts" in card
    front = yaml.safe_load(card.split("---\n")[1])
    terms = {"license": "other", "license_name": "their-own", "license_link": "LICENSE.txt"}
    assert front.items() >= {**terms, "base_model": ["org/tiny"]}.items()
    assert "Licence: their-own" in card
    made = json.loads((tmp_path / "moe" / "config.json").read_text())["moezoo_provenance"]
    assert made["source"] == "org/tiny"


def test_a_plan_says_what_fills_a_tensor_that_the_dense_model_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense_decoder(tmp_path / "smollm3", "smollm3")
    dense_decoder(tmp_path / "qwen2", "qwen2")
    for family, filled in (("smollm3", "all -16384"), ("qwen2", "all 0")):
        assert main(["plan", str(tmp_path / family), "--experts", "2"]) == 0
        assert filled in capsys.readouterr().out


@pytest.mark.parametrize("family", _OLD)
def test_a_published_model_and_its_tuned_one_merge(family: str, tmp_path: Path) -> None:
    """The second is saved by today's transformers, as a training does."""
    options, fields = _OLD[family]
    published = dense_decoder(tmp_path / "published", family, **options)
    rope = json.loads((published / "config.json").read_text())["rope_parameters"]
    old = {"rope_parameters": ..., "rope_theta": rope.pop("rope_theta"), "dtype": ...,
           "torch_dtype": "float32", "transformers_version": "4.40.1"}  # fmt: skip
    scaled = rope.get("rope_type") != "default"
    edit_config(published, **old, rope_scaling=rope if scaled else None, **fields)
    tuned = AutoModelForCausalLM.from_pretrained(published)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    tuned.save_pretrained(tmp_path / "tuned")
    edit_config(tmp_path / "tuned", eos_token_id=[2, 3], pad_token_id=1, initializer_range=0.1)
    merge([published, tmp_path / "tuned"], tmp_path / "moe", _BRANCHES)
    assert loaded(tmp_path / "moe").config.eos_token_id == 2
    merge([tmp_path / "tuned", published], tmp_path / "other", _BRANCHES)
    assert loaded(tmp_path / "other").config.eos_token_id == [2, 3]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("rope_theta", 777.0), ("max_position_embeddings", 128)],
)
def test_what_decides_a_function_is_not_merged(field: str, value: float, tmp_path: Path) -> None:
    family = "llama, scaled and tied" if field == "max_position_embeddings" else "llama"
    one, other = (dense_decoder(tmp_path / name, family) for name in "ab")
    rope = {"rope_parameters": ...} if field == "rope_theta" else {}
    edit_config(other, **rope, **{field: value})
    with pytest.raises(MoezooError, match=f"differ in shape or kind: (rope_parameters|{field})"):
        merge([one, other], tmp_path / "moe", _BRANCHES)


def test_models_of_other_tokens_are_not_merged(tmp_path: Path) -> None:
    one, other = (dense_decoder(tmp_path / name) for name in "ab")

    def tokenizer(path: Path, pieces: list[str], **more: Any) -> None:
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        text = json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, **more})
        (path / "tokenizer.json").write_text(text)

    tokenizer(one, ["a", "b"])
    tokenizer(other, ["a", "b"], added_tokens=[{"id": 2, "content": "<turn>"}])
    merge([one, other], tmp_path / "moe", _BRANCHES)
    tokenizer(other, ["b", "a"])
    with pytest.raises(MoezooError, match=r"b/tokenizer\.json: the models have different tokens"):
        merge([one, other], tmp_path / "again", _BRANCHES)
    for path, content in ((one, b"pieces"), (other, b"others")):
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.model").write_bytes(content)
    with pytest.raises(MoezooError, match=r"b/tokenizer\.model: the models have different tokens"):
        merge([one, other], tmp_path / "again", _BRANCHES)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("inputs", ["model", "embeddings"])
def test_prompts_of_ids_that_the_model_has_no_row_for_are_refused(
    inputs: str, tmp_path: Path
) -> None:
    source = dense_decoder(tmp_path / "dense")
    (tmp_path / "prompts.json").write_text("[[[5, 61]], [[3]]]")
    sample = read_calibration(tmp_path / "prompts.json", source, inputs=inputs)
    with pytest.raises(MoezooError, match="no row for; expected ids below 61, found 61"):
        upcycle(source, tmp_path / "moe", num_experts=2, router_init="prompts", calibration=sample)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached"]
)
def test_what_old_files_hold_of_rope_is_no_stranger(name: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    held = load_file(source / "model.safetensors") | {name: torch.rand(4)}
    save_file(held, source / "model.safetensors", {"format": "pt"})
    upcycle(source, tmp_path / "moe", num_experts=2)
    assert name not in load_file(tmp_path / "moe" / "model.safetensors")
    loaded(tmp_path / "moe")


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_a_save_of_the_base_class_is_sent_to_the_class_with_a_head(
    family: str, tmp_path: Path
) -> None:
    dense_decoder(tmp_path / "dense", family, tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense").model.save_pretrained(
        tmp_path / "base"
    )
    with pytest.raises(MoezooError, match="save of the base class alone.*ForCausalLM") as refused:
        upcycle(tmp_path / "base", tmp_path / "moe", num_experts=2)
    (kind,) = [word.rstrip(",") for word in str(refused.value).split() if "ForCausalLM" in word]
    assert kind == json.loads((tmp_path / "dense/config.json").read_text())["architectures"][0]
    assert not (tmp_path / "moe").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "whole")
    upcycle(tmp_path / "whole", tmp_path / "moe", num_experts=2)


@pytest.mark.parametrize("drop", [True, False])
def test_a_classifier_without_a_head_for_tokens_is_sent_to_the_class_with_one(
    drop: bool, tmp_path: Path
) -> None:
    """No config.json helps: one that ties the head would make another model of it."""
    dense_decoder(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "scored")
    with pytest.raises(MoezooError, match="and none for tokens.*load it with") as refused:
        upcycle(tmp_path / "scored", tmp_path / "moe", num_experts=2, drop_heads=drop)
    assert "LlamaForCausalLM" in str(refused.value) and "drop" not in str(refused.value)
    assert not (tmp_path / "moe").exists()


def test_a_merge_names_the_model_and_the_weight_that_it_cannot_take(tmp_path: Path) -> None:
    one, other = (dense_decoder(tmp_path / name) for name in "ab")
    held = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for value, said in ((1e6, f"a weight of '{name}' leaves the range of F16"),
                        (float("nan"), f"b: '{name}' holds NaN or infinity")):  # fmt: skip
        held[name][2, 3] = value
        save_file(held, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(MoezooError, match=said):
            merge([one, other], tmp_path / "moe", replace(_BRANCHES, dtype="float16"))
        assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("around", "of"),
    [
        ("module.", "module.model.norm.weight"),
        ("_orig_mod.", "model._orig_mod.norm.weight"),
        ("base_model.model.", "base_model.model.model.norm.weight"),
        ("language_model.", "language_model.model.norm.weight"),
        ("_fsdp_wrapped_module.", "model._fsdp_wrapped_module.norm.weight"),
    ],
)
def test_names_of_a_wrapper_are_told_as_such(around: str, of: str, tmp_path: Path) -> None:
    source = dense_decoder(tmp_path / "dense")
    before = "model.norm.weight"
    held = load_file(source / "model.safetensors")
    named = {of if n == before else n: t for n, t in held.items()}
    save_file(named, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoezooError, match=f"{of}'.*Names with '{around}' are of a wrapper"):
        upcycle(source, tmp_path / "moe", num_experts=2)
    assert not (tmp_path / "moe").exists()


def test_the_folder_of_a_cache_and_one_shard_are_told_where_the_model_is(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    with pytest.raises(MoezooError, match="no weights here.*a folder in its snapshots"):
        upcycle(tmp_path / "models--org--tiny", tmp_path / "moe", num_experts=2)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    for size, count in (("8KB", 3), ("1GB", 1)):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        file = sorted((tmp_path / size).glob("*.safetensors"))[0]
        if count > 1:
            with pytest.raises(MoezooError, match=f"one of {count} shards.*{tmp_path / size}"):
                upcycle(file, tmp_path / "moe", num_experts=2)
        else:
            upcycle(file, tmp_path / "moe", num_experts=2)
