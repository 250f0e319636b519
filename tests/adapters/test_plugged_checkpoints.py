"""A plugged model is saved and loaded again, with what was plugged where in its config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moezoo
from moezoo import sparse
from moezoo.adapters.checkpoint import read_config
from moezoo.adapters.plugged import load_plugged
from moezoo.errors import CheckpointError, ConfigError, TargetExists, TensorMismatch
from moezoo.experts import ModuleExperts

from .plugged import GPT2, MASK, SIZES, T5, Mine, hugging_face, ids

POOLED = {"name": "top_k", "k": 2}


def llama(**options: Any) -> nn.Module:
    return hugging_face("LlamaForCausalLM", "LlamaConfig", **SIZES, **options)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids(), attention_mask=MASK).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_it_comes_back_by_one_call(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = llama(tie_word_embeddings=tied)
    for parameter in model.parameters():  # angles of positions stay in float32, as in transformers
        parameter.data = parameter.data.to(dtype)
    moezoo.plug(model, "model.layers.0.mlp", sparse(4, router=POOLED, causal=True))
    moezoo.plug(model, "model.layers.1.mlp", sparse(2), mask=False)
    moezoo.save(model, tmp_path / "plugged")
    again = moezoo.load(tmp_path / "plugged")
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert {n: p.dtype for n, p in again.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    with moezoo.record(again) as tape:
        logits(again)
    first, second = (calls[0] for calls in tape.by_layer.values())
    assert first.assignment.choices == 2 and torch.equal(first.real, MASK.bool().flatten())
    assert second.real is None  # mask=False is remembered
    moezoo.save(again, tmp_path / "plugged", overwrite=True)
    assert torch.equal(logits(moezoo.load(tmp_path / "plugged")), logits(model))


def test_generation_config_and_the_words_of_the_plug_are_in_the_folder(tmp_path: Path) -> None:
    model = hugging_face("GPT2LMHeadModel", "GPT2Config", **GPT2, eos_token_id=49)
    model.generation_config.max_new_tokens = 3
    moezoo.plug(model, "transformer.h.*.mlp", sparse(4, causal=True))
    moezoo.save(model, tmp_path / "plugged")
    values = json.loads((tmp_path / "plugged" / "config.json").read_text())
    (entry,) = values["moezoo_plugged"]
    assert entry["modules"] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert entry["sparse"]["num_experts"] == 4
    again: Any = moezoo.load(tmp_path / "plugged", dtype=torch.bfloat16)
    assert again.generation_config.max_new_tokens == 3
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_a_model_of_ones_own_is_loaded_into_a_dense_one(tmp_path: Path) -> None:
    model, x = Mine(), torch.randn(2, 3, 8)
    model.blocks[1].mlp = nn.Sequential(*model.blocks[1].mlp, nn.Softsign())
    fresh = Mine()
    fresh.blocks[1].mlp = nn.Sequential(*fresh.blocks[1].mlp, nn.Softsign())
    moezoo.plug(model.eval(), "blocks.*.mlp", sparse(4))
    assert isinstance(model.blocks[1].mlp.moe.experts, ModuleExperts)
    moezoo.save(model, tmp_path / "plugged")
    with pytest.raises(ConfigError, match="load_plugged"):
        moezoo.load(tmp_path / "plugged")
    again = load_plugged(tmp_path / "plugged", fresh)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_transformers_is_loaded_into_a_plugged_model(
    tmp_path: Path, tied: bool
) -> None:
    made = [llama(tie_word_embeddings=tied) for _ in range(2)]
    for model, seed in zip(made, (1, 2), strict=True):
        torch.manual_seed(seed)
        moezoo.plug(model, "model.layers.*.mlp", sparse(4))
    model, fresh = made
    model.save_pretrained(tmp_path / "trained")  # what Trainer does
    assert not torch.equal(logits(fresh), logits(model))
    again = load_plugged(tmp_path / "trained", fresh)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(CheckpointError, match="names nothing plugged"):
        load_plugged(tmp_path / "trained", llama())
    moezoo.save(again, tmp_path / "plugged")
    assert torch.equal(logits(moezoo.load(tmp_path / "plugged")), logits(model))


def test_only_what_is_still_plugged_is_in_the_folder(tmp_path: Path) -> None:
    model, x = Mine().eval(), torch.randn(2, 3, 8)
    dense = [block.mlp for block in model.blocks]
    moezoo.plug(model, "blocks.*.mlp", sparse(4))
    model.blocks[0].mlp = dense[0]
    moezoo.save(model, tmp_path / "one")
    assert torch.equal(load_plugged(tmp_path / "one", Mine())(x), model(x))
    model.blocks[1].mlp = dense[1]
    with pytest.raises(ConfigError, match="only moezoo models"):
        moezoo.save(model, tmp_path / "none")
    moezoo.plug(model, "blocks.1.mlp", sparse(2, router=POOLED))
    moezoo.save(model, tmp_path / "again")
    (entry,) = json.loads((tmp_path / "again" / "config.json").read_text())["moezoo_plugged"]
    assert (entry["modules"], entry["sparse"]["num_experts"]) == (["blocks.1.mlp"], 2)
    assert torch.equal(load_plugged(tmp_path / "again", Mine())(x), model(x))


def test_a_module_in_two_places_is_saved_as_plugged_in_both(tmp_path: Path) -> None:
    model, x = Mine().eval(), torch.randn(2, 3, 8)
    fresh = Mine()
    for one in (model, fresh):
        one.blocks[1].mlp = one.blocks[0].mlp
    moezoo.plug(model, "blocks.*.mlp", sparse(4))
    moezoo.save(model, tmp_path / "plugged")
    again = load_plugged(tmp_path / "plugged", fresh)
    assert again.blocks[0].mlp is again.blocks[1].mlp
    assert torch.equal(again(x), model(x))


def test_adapters_are_merged_before_a_plugged_model_is_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    moezoo.plug(model, "model.layers.*.mlp", sparse(4))
    lora = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.wo"])
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = logits(adapted)
    with pytest.raises(ConfigError, match="holds an adapter.*merge_and_unload"):
        moezoo.save(model, tmp_path / "plugged")
    moezoo.save(adapted.merge_and_unload(), tmp_path / "plugged")
    torch.testing.assert_close(logits(moezoo.load(tmp_path / "plugged")), expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_torch_quantised_is_not_saved(tmp_path: Path) -> None:
    model = Mine()
    model.blocks[0].mlp.append(nn.LayerNorm(8))
    moezoo.plug(model, "blocks.*.mlp", sparse(4))
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    with pytest.raises(ConfigError, match="is no tensor.*before it is quantised"):
        moezoo.save(model, tmp_path / "plugged")


def test_the_part_that_was_plugged_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Mine())
    moezoo.plug(model[1], "blocks.*.mlp", sparse(4))
    with pytest.raises(ConfigError, match="Save its '1', which is what was plugged"):
        moezoo.save(model, tmp_path / "plugged")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
@pytest.mark.parametrize("before", [True, False])
def test_a_wrapper_is_looked_through(tmp_path: Path, wrap: Any, before: bool) -> None:
    model, x = Mine().eval(), torch.randn(2, 3, 8)
    wrapped = wrap(model)
    names = moezoo.plug(model if before else wrapped, "*.mlp", sparse(4))
    assert before or all(isinstance(wrapped.get_submodule(n), moezoo.SparseMLP) for n in names)
    moezoo.save(wrapped, tmp_path / "plugged")
    assert torch.equal(load_plugged(tmp_path / "plugged", Mine())(x), model(x))


def test_what_a_config_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    router = moezoo.routers.build("switch", d_model=8, num_experts=4)
    for make, mask, word in (
        (lambda mlp: moezoo.SparseMLP(8, 16, 4), None, "only `sparse`"),
        (sparse(4, router=router), None, "SwitchRouter cannot be named"),
        (sparse(4), lambda given: None, "function cannot be named"),
    ):
        model = Mine()
        moezoo.plug(model, "blocks.0.mlp", make, mask=mask)
        with pytest.raises(ConfigError, match=word):
            moezoo.save(model, tmp_path / "plugged")
    model = Mine()
    moezoo.plug(model, "blocks.*.mlp", sparse(4))
    with pytest.raises(ConfigError, match="plugged model has no layout"):
        moezoo.save(model, tmp_path / "plugged", layout="moezoo")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_takes_folders_of_other_kinds_says_what_this_one_is(tmp_path: Path, kind: str) -> None:
    from moezoo.adapters.hf.directory import record_text

    model = llama() if kind == "llama" else hugging_face("T5EncoderModel", "T5Config", **T5)
    moezoo.plug(model, re.compile(r".*(mlp|DenseReluDense)"), sparse(4))
    moezoo.save(model, tmp_path / "plugged")
    for take in (
        read_config,
        lambda path: moezoo.upcycle(path, tmp_path / "out", num_experts=4),
        lambda path: record_text(path, ["some text"]),
    ):
        with pytest.raises(ConfigError, match="a model that moezoo.plug has put experts into"):
            take(tmp_path / "plugged")


def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "plugged"
    model = llama()
    moezoo.plug(model, "model.layers.*.mlp", sparse(4))
    moezoo.save(model, folder)
    with pytest.raises(TargetExists):
        moezoo.save(model, folder)
    with pytest.raises(ConfigError, match="plugged model has no task"):
        moezoo.load(folder, task="model")
    values = json.loads((folder / "config.json").read_text())

    def says(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    (entry,) = values["moezoo_plugged"]
    says(moezoo_plugged=[{**entry, "modules": ["model.layers.7.mlp"]}])
    with pytest.raises(ConfigError, match="no module 'model.layers.7.mlp'"):
        moezoo.load(folder)
    says(moezoo_plugged=[{**entry, "modules": [*entry["modules"], "model.layers.7.mlp"]}])
    with pytest.raises(ConfigError, match="no module 'model.layers.7.mlp'"):
        moezoo.load(folder)
    says(moezoo_plugged=[{**entry, "modules": entry["modules"][:1]}])
    with pytest.raises(TensorMismatch, match="missing tensor 'model.layers.1.mlp.down_proj"):
        moezoo.load(folder)
    says(moezoo_plugged=[{**entry, "sparse": {**entry["sparse"], "num_experts": 3}}])
    with pytest.raises(TensorMismatch, match="wrong shape"):
        moezoo.load(folder)
    for wrong in (
        {},
        [3],
        [{"modules": []}],
        [{**entry, "sparse": {}}],
        [{**entry, "modules": [1]}],
    ):
        says(moezoo_plugged=wrong)
        with pytest.raises(ConfigError, match="does not say what was plugged"):
            moezoo.load(folder)
    says(architectures=["NoSuchModel"])
    with pytest.raises(ConfigError, match="NoSuchModel"):
        moezoo.load(folder)
    with pytest.raises(CheckpointError, match="names nothing plugged"):
        load_plugged(tmp_path)
