"""For any config of the family: what is written is read back, and says what transformers needs."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moezoo.adapters.families import family_of, layout_for
from moezoo.adapters.families.base import Weights
from moezoo.config import ACTIVATIONS, SwitchConfig

SIZES = {"vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 4}
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3)
ID = st.integers(0, 60)


@st.composite
def configs(draw: st.DrawFn) -> SwitchConfig:
    """Dense and sparse models as files of the family tell them."""
    fields: dict[str, Any] = {
        "feed_forward_proj": draw(st.sampled_from(ACTIVATIONS)),
        "num_decoder_layers": draw(st.integers(1, 5)),
        "tie_word_embeddings": draw(st.booleans()),
        "scale_decoder_outputs": draw(st.booleans()),
        "position_bias_every_layer": draw(st.booleans()),
        "pad_token_id": draw(ID),
        "eos_token_id": draw(ID | st.lists(ID, max_size=3)),
        "decoder_start_token_id": draw(ID),
        "dropout_rate": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "other_fields": draw(st.dictionaries(st.sampled_from("xyz"), st.lists(LEAVES) | LEAVES)),
    }
    if draw(st.booleans()):
        fields |= {
            "num_experts": draw(st.integers(1, 3)),
            "encoder_sparse_layers": draw(st.sampled_from(["odd", "all", "none"])),
            "decoder_sparse_layers": "all",
            "router_bias": draw(st.booleans()),
            "router_losses": {"load_balance": 0.5, "z": 0.25},
            "expert_capacity": draw(st.integers(1, 70)),
            "capacity": draw(st.sampled_from([None, "dropless", "transformers"])),
            "group": draw(st.sampled_from(["batch", "sequence"])),
        }
    return SwitchConfig(**SIZES, **fields)


@given(configs(), st.sampled_from(["auto", "moezoo"]))
def test_what_is_written_is_read_back(config: SwitchConfig, layout: str) -> None:
    family = layout_for(config, layout)
    written = json.loads(json.dumps(family.write(config, "conditional_generation")))
    names = frozenset({"decoder.block.0.layer.0.layer_norm.weight"})
    weights = Weights(names, own_head=not config.tie_word_embeddings)
    again = family_of(written).read(written, weights)
    same = {"encoder_sparse_layers": config.encoder_sparse}
    same |= {"decoder_sparse_layers": config.decoder_sparse}
    assert again.replace(**same) == config.replace(**same)
    assert again.other_fields == config.other_fields
    if "expert_capacity" in written:
        assert written["expert_capacity"] == config.expert_capacity
    assert {k: written[k] for k in config.other_fields} == config.to_dict()["other_fields"]


@given(st.sampled_from(["t5", "mt5", "umt5"]), st.booleans(), st.sampled_from([None, True, False]))
def test_outputs_are_scaled_as_the_file_says(model: str, own: bool, tied: bool | None) -> None:
    values = {**SIZES, "model_type": model, "tie_word_embeddings": tied}
    config = family_of(values).read(values, Weights(frozenset(), own))
    assert config.scales_logits is (model != "mt5" and tied is not False)


@given(st.integers(1, 70), st.sampled_from([None, "dropless", "transformers"]))
def test_a_switchs_own_capacity_is_written_as_it_was_read(number: int, capacity: Any) -> None:
    values = {**SIZES, "model_type": "switch_transformers", "expert_capacity": number}
    weights = Weights(frozenset(), own_head=False)
    config = family_of(values).read(values, weights).replace(capacity=capacity)
    written = layout_for(config, "huggingface").write(config, "conditional_generation")
    assert written["expert_capacity"] == config.expert_capacity == number
