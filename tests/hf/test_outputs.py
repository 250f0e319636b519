"""What a wrapped model returns is what transformers' T5 returns, and it is what was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

import moezoo
from moezoo.adapters.hf import MoezooForConditionalGeneration, MoezooModel
from moezoo.adapters.hf.outputs import CACHE
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError

from .tiny import SIZES, batch, wrapped

EVERYTHING: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}


def test_hidden_states_and_attentions_are_those_of_transformers_t5(tmp_path: Path) -> None:
    switch = SwitchConfig(**{**SIZES, "num_experts": 0, "tie_word_embeddings": True})
    moezoo.save(moezoo.build(switch, seed=0), tmp_path / "t5", layout="huggingface")
    theirs = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "t5", attn_implementation="eager"
    )
    ours = MoezooForConditionalGeneration.from_pretrained(tmp_path / "t5")
    inputs = batch()
    del inputs["labels"]
    inputs["decoder_input_ids"] = torch.tensor([[0, 5, 6, 7]] * 3)
    expected, found = theirs(**inputs, **EVERYTHING), ours(**inputs, **EVERYTHING)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
    for name in (
        "encoder_hidden_states", "decoder_hidden_states", "encoder_attentions",
        "decoder_attentions", "cross_attentions",
    ):  # fmt: skip
        pairs = zip(getattr(found, name), getattr(expected, name), strict=True)
        for ours_there, theirs_there in pairs:
            torch.testing.assert_close(ours_there, theirs_there, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_computes_what_the_fused_one_does(dtype: torch.dtype) -> None:
    model = wrapped().to(dtype)
    fused = model(**batch()).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(**batch()).logits, fused, atol=tolerance, rtol=tolerance)
    with pytest.raises(ValueError, match="(?i)flash"):
        model.set_attn_implementation("flash_attention_2")


def test_a_registered_attention_is_called() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def mine(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        calls.append(options["scaling"])
        scores = query @ key.mT if mask is None else query @ key.mT + mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("mine", mine)
    model = wrapped()
    expected = model(**batch()).logits
    model.set_attn_implementation("mine")
    torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-5, rtol=1e-5)
    assert calls == [1.0] * 6


def test_the_config_asks_as_the_arguments_do_and_an_argument_goes_before_it() -> None:
    model = wrapped()
    model.set_attn_implementation("eager")
    for name in (*EVERYTHING, "output_router_logits"):
        setattr(model.config, name, True)
    found = model(**batch())
    assert len(found.encoder_hidden_states) == len(found.decoder_hidden_states) == 3
    assert [w.shape for w in found.cross_attentions] == [(3, 4, 5, 7)] * 2
    assert model(**batch(), output_hidden_states=False).encoder_hidden_states is None
    assert torch.equal(found.encoder_hidden_states[-1], found.encoder_last_hidden_state)


def test_router_logits_are_those_of_the_sparse_layers() -> None:
    model = wrapped()
    found = model(**batch(), output_router_logits=True)
    assert model(**batch()).encoder_router_logits is None
    with moezoo.record(model) as tape:
        model(**batch())
    expected = [routings[0].logits for routings in tape.by_layer.values()]
    for ours, theirs in zip(
        (*found.encoder_router_logits, *found.decoder_router_logits), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_tuple_holds_what_the_output_holds() -> None:
    model = wrapped()
    whole, parts = model(**batch()), model(**batch(), return_dict=False)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[0], whole.loss)
    assert torch.equal(parts[1], whole.logits)
    model.config.return_dict = False
    assert isinstance(model(**batch()), tuple)
    assert isinstance(model.encoder(batch()["input_ids"]), tuple)


def test_a_model_without_a_head_takes_a_cache_and_positional_arguments() -> None:
    model = MoezooModel.wrap(moezoo.build(SwitchConfig(**SIZES), task="model", seed=0))
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    targets = torch.tensor([[0, 5, 6, 7]] * 3)
    whole = model(ids, mask, targets, use_cache=False)
    assert getattr(whole, CACHE) is None
    first = model(ids, mask, targets[:, :3])
    rest = model(
        None, mask, targets[:, 3:], encoder_outputs=(first.encoder_last_hidden_state,),
        **{CACHE: first[CACHE]},
    )  # fmt: skip
    assert rest[CACHE].get_seq_length() == 4
    torch.testing.assert_close(rest.last_hidden_state, whole.last_hidden_state[:, 3:])


@pytest.mark.parametrize("kind", [MoezooModel, MoezooForConditionalGeneration])
def test_a_cache_has_the_names_of_all_versions_of_transformers(kind: Any) -> None:
    model = kind.wrap(moezoo.build(SwitchConfig(**SIZES), task=kind.task, seed=0))
    ids = batch()["input_ids"]
    whole = model(ids, decoder_input_ids=ids)
    for holder in (model, model.decoder):
        given = {"decoder_input_ids": ids[:, :2]} if holder is model else {}
        first = holder(ids if holder is model else ids[:, :2], use_cache=True, **given)
        assert first.to_tuple()[1] is first[CACHE]  # where transformers' T5 has it
        assert first[CACHE].get_seq_length() == 2
    parts = []
    for name in ("past_key_values", "cache"):
        cache = model(ids, decoder_input_ids=ids[:, :2], use_cache=True)[CACHE]
        with pytest.raises(ConfigError, match="cache and past_key_values are both given"):
            model(ids, decoder_input_ids=ids, past_key_values=cache, cache=cache)
        parts.append(model(ids, decoder_input_ids=ids[:, 2:], **{name: cache})[0])
    assert torch.equal(*parts)
    torch.testing.assert_close(parts[0], whole[0][:, 2:], atol=1e-5, rtol=1e-4)


def test_recording_leaves_nothing_behind() -> None:
    model = wrapped()
    before = model(**batch()).logits
    model(**batch(), **EVERYTHING)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "keep" not in vars(module)
    assert torch.equal(model(**batch()).logits, before)
