"""The parts of a wrapped model, by the names that T5's have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moezoo
from moezoo.adapters.hf import MoezooForConditionalGeneration
from moezoo.adapters.hf.outputs import CACHE
from moezoo.config import SwitchConfig

from .tiny import SIZES, batch, wrapped


@pytest.mark.parametrize("tied", [True, False])
def test_the_parts_have_t5s_names(tied: bool) -> None:
    model = wrapped(tie_word_embeddings=tied)
    assert model.get_encoder() is model.encoder
    assert model.get_decoder() is model.decoder
    assert model.get_input_embeddings() is model.shared is model.encoder.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head
    assert (model.lm_head.weight is model.shared.weight) is tied
    hidden = model(**batch()).encoder_last_hidden_state
    inputs = {n: x for n, x in batch().items() if n != "labels"}
    torch.testing.assert_close(model.encoder(**inputs).last_hidden_state, hidden)


def test_a_decoder_is_called_by_itself() -> None:
    model, inputs = wrapped(), batch()
    ids = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    whole = model(inputs["input_ids"], inputs["attention_mask"], ids)
    found = model.decoder(
        input_ids=ids, encoder_hidden_states=whole.encoder_last_hidden_state,
        encoder_attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    torch.testing.assert_close(model.lm_head(found.last_hidden_state), whole.logits)
    assert found[CACHE].get_seq_length() == 5


def test_freezing_the_encoder_freezes_it() -> None:
    model = wrapped().train()
    for parameter in model.get_encoder().parameters():
        parameter.requires_grad_(False)
    model(**batch()).loss.backward()
    named = dict(model.named_parameters())
    assert all((".encoder." in name) is (p.grad is None) for name, p in named.items())


def test_wrapping_leaves_the_model_as_it_is_and_shares_its_weights() -> None:
    inner: Any = moezoo.build(SwitchConfig(**{**SIZES, "tie_word_embeddings": True}), seed=0)
    names, kinds = list(inner.state_dict()), [type(m) for m in inner.modules()]
    model = MoezooForConditionalGeneration.wrap(inner)
    assert list(inner.state_dict()) == names
    assert [type(m) for m in inner.modules()] == kinds
    with torch.no_grad():
        inner.shared.weight.mul_(2)
    ours, theirs = inner(**batch()).logits, model(**batch()).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_other_embeddings_and_another_head_take_their_places() -> None:
    model = wrapped()
    table, head = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.shared is table
    assert model.lm_head is head
    model.lm_head = other = nn.Linear(32, 96, bias=False)
    assert model.model.lm_head is other
    assert "lm_head" not in dict(model.named_children())


@pytest.mark.parametrize("own", [(), ("encoder",), ("encoder", "decoder")])
@pytest.mark.parametrize("tied", [True, False])
def test_every_table_is_resized_with_the_config(
    own: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    config = SwitchConfig(**{**SIZES, "tie_word_embeddings": tied}, own_embeddings=own)
    model = MoezooForConditionalGeneration.wrap(moezoo.build(config, seed=0))
    before = model(**batch()).logits
    rows = model.resize_token_embeddings(200, pad_to_multiple_of=64).weight
    assert rows.shape[0] == model.config.vocab_size == model.config.switch.vocab_size == 256
    assert rows is model.get_input_embeddings().weight
    assert (model.lm_head.weight is model.shared.weight) is tied
    torch.testing.assert_close(model(**batch()).logits[..., :96], before)
    model.save_pretrained(tmp_path / "saved")
    again = MoezooForConditionalGeneration.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 255, 1]])
    assert torch.equal(again(ids, labels=ids).logits, model(ids, labels=ids).logits)
    assert model.resize_token_embeddings(96).weight.shape[0] == 96
    torch.testing.assert_close(model(**batch()).logits, before)


def test_a_router_that_knows_the_vocabulary_refuses_another() -> None:
    with pytest.raises(moezoo.MoezooError, match="routes by token id"):
        wrapped(router="hash").resize_token_embeddings(128)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = wrapped(tie_word_embeddings=True)
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.shared.weight is not model.shared.weight
    with torch.no_grad():
        other.shared.weight.zero_()
    ids = batch()["input_ids"]
    assert not other.encoder(ids).last_hidden_state.any()
    assert model.encoder(ids).last_hidden_state.any()


def test_recomputing_is_switched_as_in_transformers_and_keeps_router_gradients() -> None:
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = wrapped(dropout_rate=0.1).train()
        assert not model.recomputes
        if options is not None:
            model.gradient_checkpointing_enable(options)
            assert all(block.gradient_checkpointing for block in model.encoder.blocks)
        torch.manual_seed(0)
        model(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.recomputes
