"""A wrapped model is the moezoo model, by the words of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, pipeline

import moezoo
import moezoo.adapters
from moezoo import routers
from moezoo.adapters.hf import (
    MoezooConfig,
    MoezooEncoderModel,
    MoezooForConditionalGeneration,
    MoezooModel,
)
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError

from .tiny import SIZES, batch, wrapped

moezoo.adapters.register_transformers()
ROUTERS = {name: {"name": name} for name in routers.registry.names()}


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_has_the_loss_of_moezoo_with_its_router_losses(router: str) -> None:
    model = wrapped(router=router, allow_noncausal=True)
    inputs = batch()
    ours, theirs = model.model(**inputs), model(**inputs)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    if theirs.aux_loss is not None:
        whole = ours.losses["cross_entropy"] + theirs.aux_loss
        torch.testing.assert_close(theirs.loss, whole)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("router", ["switch", "hash", {"name": "top_k", "k": 2}], ids=str)
def test_generate_of_transformers_finds_what_moezoo_finds(
    router: Any, num_beams: int, use_cache: bool
) -> None:
    model, inputs = wrapped(router=router), batch()
    del inputs["labels"]
    ours = model.model.generate(**inputs, max_new_tokens=6, num_beams=num_beams)
    theirs = model.generate(
        **inputs, max_new_tokens=6, num_beams=num_beams, use_cache=use_cache, do_sample=False
    )
    # Where the pad id is 0, transformers' beam search fills up with the end token instead.
    ends = theirs == model.config.switch.eos_token_id
    theirs = theirs.masked_fill(ends.cumsum(1) - ends.long() > 0, model.config.switch.pad_token_id)
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 3


def test_padding_of_a_collator_does_not_reach_the_experts() -> None:
    model, inputs = wrapped(), batch()
    shifted = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    assert torch.equal(model(**inputs, decoder_input_ids=shifted).loss, model(**inputs).loss)


def test_shares_of_accumulated_batches_sum_to_the_loss_of_one_large_batch() -> None:
    model, inputs = wrapped(router_losses={}), batch()
    whole = model(**inputs).loss
    count = (inputs["labels"] != -100).sum()
    rows = [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(3)]
    parts = sum(model(**row, num_items_in_batch=count).loss for row in rows)
    torch.testing.assert_close(whole, parts)


def test_what_is_saved_comes_back_through_auto_classes_and_through_moezoo(tmp_path: Path) -> None:
    model, inputs = wrapped(feed_forward_proj="gated-gelu", tie_word_embeddings=False), batch()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoezooConfig)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoezooForConditionalGeneration)
    expected = model(**inputs).logits
    assert torch.equal(loaded(**inputs).logits, expected)
    assert torch.equal(moezoo.load(tmp_path)(**inputs).logits, expected)
    assert not list(tmp_path.glob(".saving*"))


@pytest.mark.parametrize(
    ("task", "kind"), [("encoder", MoezooEncoderModel), ("model", MoezooModel)]
)
def test_auto_model_finds_the_class_that_the_config_names(
    task: str, kind: type, tmp_path: Path
) -> None:
    ids = batch()["input_ids"]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if task == "model" else {})
    ours = moezoo.build(SwitchConfig(**SIZES), task=task, seed=0)
    moezoo.save(ours, tmp_path / "saved", layout="moezoo")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is kind
    assert torch.equal(loaded(**inputs)[0], ours(**inputs).last_hidden_state)


def test_a_dense_t5_directory_loads_into_the_wrapper(tmp_path: Path) -> None:
    dense = moezoo.build(SwitchConfig(**{**SIZES, "num_experts": 0}), seed=0)
    moezoo.save(dense, tmp_path / "t5", layout="huggingface")
    loaded = MoezooForConditionalGeneration.from_pretrained(tmp_path / "t5", dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16


def test_saved_names_load_into_a_live_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, inputs = wrapped(), batch()
    model.save_pretrained(tmp_path)
    other = MoezooForConditionalGeneration(model.config).eval()
    assert not torch.equal(other(**inputs).loss, model(**inputs).loss)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(**inputs).loss, model(**inputs).loss)


def test_given_weights_are_saved_instead_of_the_models_own(tmp_path: Path) -> None:
    model, inputs = wrapped(), batch()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=zeros)
    loaded = MoezooForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded(**inputs).logits.any()
    assert model(**inputs).logits.any()


def test_an_encoder_serves_the_feature_extraction_pipeline() -> None:
    class Words:
        """Token ids of numbers, for a pipeline that wants a tokenizer."""

        def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    encoder = MoezooEncoderModel.wrap(moezoo.build(SwitchConfig(**SIZES), task="encoder", seed=0))
    run = pipeline("feature-extraction", model=encoder, tokenizer=Words(), device="cpu")
    found = torch.tensor(run("5 6 7"))
    expected = encoder(torch.tensor([[5, 6, 7]])).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_a_wrapper_refuses_a_model_of_another_task() -> None:
    encoder = moezoo.build(SwitchConfig(**SIZES), task="encoder")
    with pytest.raises(ConfigError, match="SwitchForConditionalGeneration"):
        MoezooForConditionalGeneration.wrap(encoder)
