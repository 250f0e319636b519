"""PEFT on a wrapped model: adapters of transformers, and every kind of tuning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, pipeline

from moezoo.adapters.hf import MoezooForConditionalGeneration, register

from .tiny import batch, wrapped

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
register()
Model = MoezooForConditionalGeneration
TASK = {"task_type": "SEQ_2_SEQ_LM"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch()).logits
    return found


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"init_lora_weights": False, **options})


def is_adapted(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    wrapped().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [Model, AutoModelForSeq2SeqLM])
def test_an_adapter_is_added_saved_and_comes_back_with_its_model(
    base: Path, kind: Any, tmp_path: Path
) -> None:
    model = kind.from_pretrained(base)
    model.add_adapter(lora())  # the modules that are adapted in T5, by default
    assert is_adapted(model)
    assert all("lora" in name for name in model.get_adapter_state_dict())
    ids = batch()["input_ids"]
    model.generate(ids, max_new_tokens=3)
    model.save_pretrained(tmp_path / "adapter")
    files = set(os.listdir(tmp_path / "adapter"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not files & {"config.json", "model.safetensors"}
    again = kind.from_pretrained(tmp_path / "adapter")
    assert again._hf_peft_config_loaded
    assert torch.equal(logits(again), logits(model))
    inside = kind.from_pretrained(base)
    inside.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(inside), logits(model))


def test_a_pipeline_takes_a_folder_and_that_of_an_adapter(base: Path, tmp_path: Path) -> None:
    letters = {chr(32 + i): 3 + i for i in range(90)}
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, **letters}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = Model.from_pretrained(base)
    model.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "base")
    model = Model.from_pretrained(tmp_path / "base")
    model.add_adapter(lora())
    model.save_pretrained(tmp_path / "adapter")
    for folder, adapted in (("base", False), ("adapter", True)):
        pipe = pipeline("text-generation", str(tmp_path / folder))
        assert type(pipe.model) is Model
        assert is_adapted(pipe.model) is adapted
        assert pipe("Hello", max_new_tokens=3)[0]["generated_text"]


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="transformers before 5.23 does not look into the subfolder, for T5 neither",
)
def test_an_adapter_in_a_subfolder_is_found(base: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(base)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path / "repo" / "sub")
    where = {"adapter_kwargs": {"subfolder": "sub"}}
    inside = Model.from_pretrained(base)
    inside.load_adapter(str(tmp_path / "repo"), **where)
    for found in (inside, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "repo", **where)):
        assert torch.equal(logits(found), logits(model))


def test_adapters_are_enabled_disabled_mixed_and_deleted(base: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(base)
    plain = logits(model)
    model.add_adapter(lora())
    first = logits(model)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-4)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.add_adapter(lora(), adapter_name="second")
    model.set_adapter("second")
    assert model.active_adapters() == ["second"]
    second = logits(model)
    model.set_adapter(["second", "default"])
    for other in (plain, first, second):
        assert not torch.allclose(logits(model), other)
    with pytest.raises(ValueError, match="Multiple active adapters"):
        model.save_pretrained(tmp_path)
    model.delete_adapter(["default", "second"])
    assert not model._hf_peft_config_loaded
    with pytest.raises(ValueError, match="adapter"):
        model.delete_adapter("third")


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_saved_with_an_adapter_trains(tied: bool) -> None:
    model = wrapped(tie_word_embeddings=tied)
    model.add_adapter(lora(modules_to_save=["lm_head"]))
    assert any(name.endswith("lm_head.weight") for name in model.get_adapter_state_dict())
    model(**batch()).logits.mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert any("lm_head" in name for name in trained)


def test_adapters_train_while_blocks_are_recomputed(base: Path) -> None:
    model, ids = Model.from_pretrained(base).train(), batch()["input_ids"]
    model.add_adapter(lora())
    assert not model.get_input_embeddings()(ids).requires_grad
    model.gradient_checkpointing_enable()
    assert model.get_input_embeddings()(ids).requires_grad
    model(**batch()).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in n and p.grad is not None for n, p in trained.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_state_dict_becomes_an_adapter_and_surplus_and_missing_names_are_told(
    base: Path, low_cpu_mem_usage: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model.from_pretrained(base)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    again = Model.from_pretrained(base)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    again.load_adapter(adapter_state_dict=state, peft_config=lora(), **options)
    assert not any(p.is_meta for p in again.parameters())
    assert torch.equal(logits(again), logits(model))
    name = next(iter(state))
    state["foobar"] = state.pop(name)
    third = Model.from_pretrained(base)
    info = third.load_adapter(adapter_state_dict=state, peft_config=lora(), **options)
    if info is not None:
        assert any("foobar" in key for key in info.unexpected_keys)
        assert info.missing_keys


TUNINGS: dict[str, Any] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, **TASK),
    "all-linear": lambda: peft.LoraConfig(target_modules="all-linear", **TASK),
    "pissa": lambda: peft.LoraConfig(
        target_modules="all-linear", init_lora_weights="pissa", **TASK
    ),
    "olora": lambda: peft.LoraConfig(
        target_modules="all-linear", init_lora_weights="olora", **TASK
    ),
    "tokens": lambda: peft.LoraConfig(target_modules=["q"], trainable_token_indices=[3, 4], **TASK),
    "ia3": lambda: peft.IA3Config(**TASK),
    "router": lambda: peft.LoraConfig(target_modules=["classifier"], **TASK),
    "embeddings": lambda: peft.LoraConfig(target_modules=["shared"], **TASK),
}
VIRTUAL = ("prompt", "prefix", "p-tuning")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TUNINGS)
def test_every_tuning_starts_exact_trains_generates_and_comes_back(
    name: str, tied: bool, tmp_path: Path
) -> None:
    plain = logits(wrapped(tie_word_embeddings=tied))
    model = peft.get_peft_model(wrapped(tie_word_embeddings=tied), TUNINGS[name]())
    if name not in VIRTUAL:
        torch.testing.assert_close(logits(model), plain, atol=1e-4, rtol=1e-4)
    inputs = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model.train()(**inputs).loss
    before.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad is (parameter.grad is not None), parameter_name
    optimizer.step()
    del inputs["labels"]
    assert model.eval().generate(**inputs, max_new_tokens=4).shape[0] == 3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(wrapped(tie_word_embeddings=tied), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model), plain, atol=1e-6)
