"""The config of a wrapped model says what the model is, and the model is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moezoo
from moezoo.adapters.hf import MoezooConfig, MoezooForConditionalGeneration
from moezoo.adapters.hf.configuration import FIELDS
from moezoo.adapters.hf.outputs import CACHE
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError

from .tiny import SIZES, batch, wrapped


def test_every_field_of_a_switch_config_is_an_attribute_with_its_value() -> None:
    switch = SwitchConfig(**SIZES, feed_forward_proj="gated-gelu", eos_token_id=(1, 3))
    config = MoezooConfig.of(switch)
    for name in FIELDS:
        expected = 2 if name == "num_decoder_layers" else switch.to_dict()[name]
        assert getattr(config, name) == expected
    assert config.switch.replace(num_decoder_layers=None) == switch


def test_sizes_have_their_usual_names_in_memory_and_on_disk() -> None:
    config = MoezooConfig(d_model=48, num_heads=6, num_layers=3)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 6, 3)
    values = json.loads(config.to_json_string())
    assert (values["d_model"], values["num_heads"], values["num_layers"]) == (48, 6, 3)
    assert config.to_dict()["moezoo_config"]["d_model"] == 48


@pytest.mark.parametrize(
    ("name", "value"),
    [("d_model", 40), ("num_experts", 0), ("dropout_rate", 0.3), ("tie_word_embeddings", True)],
)
def test_a_model_is_built_from_what_was_set_on_the_config(name: str, value: Any) -> None:
    config = MoezooConfig(**SIZES)
    setattr(config, name, value)
    model = MoezooForConditionalGeneration._from_config(config)
    assert getattr(model.model.config, name) == value
    assert getattr(model.config, name) == value
    tied = model.lm_head.weight is model.shared.weight
    assert tied is model.config.tie_word_embeddings


def test_only_a_config_that_was_stored_before_has_the_papers_initial_weights() -> None:
    small = {"d_model": 64, "num_experts": 4}
    assert MoezooConfig(**small).switch.initializer_scale is None
    assert MoezooConfig.of(SwitchConfig(**small)).switch.initializer_scale is None
    stored = {**SwitchConfig(**small).to_dict()}
    del stored["initializer_scale"]
    config = MoezooConfig(moezoo_config=stored)
    assert config.switch.initializer_scale == 0.1
    assert MoezooConfig.from_dict(config.to_dict()).switch.initializer_scale == 0.1


def test_special_ids_that_are_set_on_a_live_config_are_followed() -> None:
    model, labels = wrapped(), torch.tensor([[5, -100, 6]])
    model.config.decoder_start_token_id = 9
    model.config.pad_token_id = 4
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[9, 5, 4]]
    model.config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        model.prepare_decoder_input_ids_from_labels(labels)


def test_other_fields_survive_saving_and_loading(tmp_path: Path) -> None:
    model = wrapped()
    model.config.task_specific_params = {"summarization": {"prefix": "sum: "}}
    model.config.my_field = "kept"
    model.config.use_cache = False
    model.generation_config.num_beams = 3
    model.generation_config.my_option = 7
    model.save_pretrained(tmp_path)
    again = MoezooForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.task_specific_params == {"summarization": {"prefix": "sum: "}}
    assert (again.config.my_field, again.config.use_cache) == ("kept", False)
    assert (again.generation_config.num_beams, again.generation_config.my_option) == (3, 7)
    assert again.name_or_path == again.config.name_or_path == str(tmp_path)
    found = again(**{name: x for name, x in batch().items() if name != "labels"},
                  decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))  # fmt: skip
    assert getattr(found, CACHE) is None  # as use_cache says


def test_generation_settings_in_the_config_of_an_old_t5_are_followed(tmp_path: Path) -> None:
    dense = moezoo.build(SwitchConfig(**{**SIZES, "num_experts": 0}), seed=0)
    moezoo.save(dense, tmp_path / "t5", layout="huggingface")
    (tmp_path / "t5" / "generation_config.json").unlink()
    file = tmp_path / "t5" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_beams": 4}))
    loaded = MoezooForConditionalGeneration.from_pretrained(tmp_path / "t5")
    assert loaded.generation_config.num_beams == 4


def test_a_config_reads_what_moezoo_saved_and_moezoo_reads_what_it_saves(tmp_path: Path) -> None:
    switch = SwitchConfig(**SIZES, router={"name": "top_k", "k": 2}, capacity="dropless")
    moezoo.save(moezoo.build(switch, seed=0), tmp_path / "saved", layout="moezoo")
    config = MoezooConfig.from_pretrained(tmp_path / "saved", dropout_rate=0.25)
    assert config.switch.router == {"name": "top_k", "k": 2}
    assert config.switch.dropout_rate == 0.25
    assert MoezooConfig(moezoo_config={"d_model": 48, "d_kv": 4}, d_model=40).d_model == 40
    with pytest.raises(ConfigError, match="feed_forward_proj"):
        MoezooConfig(feed_forward_proj="gelu-gated")


def test_an_edited_config_json_means_the_same_to_moezoo_and_to_transformers(
    tmp_path: Path,
) -> None:
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "capacity": "dropless"}))
    ours: Any = moezoo.load(tmp_path)
    theirs = MoezooForConditionalGeneration.from_pretrained(tmp_path)
    assert ours.config.capacity == theirs.model.config.capacity == "dropless"
    assert not ours.config.other_fields.keys() & set(FIELDS)
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


def test_caches_know_the_number_of_decoder_layers() -> None:
    config = MoezooConfig(**{**SIZES, "num_decoder_layers": 3})
    assert config.get_text_config(decoder=True).num_hidden_layers == 3
    assert config.num_hidden_layers == 2
