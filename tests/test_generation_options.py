"""One table of options: what it refuses, what goes before what, and who shows it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

import moezoo
from moezoo.cli import generate
from moezoo.errors import ConfigError
from moezoo.generation_options import (
    OPTIONS,
    UNFOLLOWED,
    GenerationOptions,
    StoredGeneration,
    options_for,
)

CONFIG = moezoo.SwitchConfig(vocab_size=50, eos_token_id=(3, 4), pad_token_id=5)
PAGE = Path(__file__).parent.parent / "docs" / "generation.md"
# Fields of transformers' GenerationConfig that change no token by themselves.
CHANGE_NOTHING = {
    *("cache_config", "max_cache_len", "prefill_chunk_size", "low_memory", "bos_token_id"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "transformers_version", "_from_model_config"),
    # Nothing without an assistant, a lookup or groups of beams, which are refused or cannot be.
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type", "diversity_penalty"),
}


def test_the_page_lists_every_option_once_as_it_is() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    expected = []
    for name, option in OPTIONS.items():
        default = "" if option.default is None else f"`{option.default}`".lower()
        kind, text = option.metadata["kind"].words, option.metadata["text"]
        expected.append(f"| `{name}` | {kind} | {default} | {text} |")
    assert rows == expected
    for name in UNFOLLOWED:
        assert f"`{name}`" in PAGE.read_text() or name == "cache_implementation"


def test_every_option_is_a_flag_of_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    generate.configure(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {f"--{name.replace('_', '-')}" for name in OPTIONS} <= flags
    said = vars(parser.parse_args(["checkpoint"]))
    assert all(said[name] is None for name in OPTIONS)  # the checkpoint's choice


def test_fields_and_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    fields = set(vars(transformers.GenerationConfig())) - {"_original_object_hash", "_commit_hash"}
    assert fields <= OPTIONS.keys() | UNFOLLOWED.keys() | CHANGE_NOTHING
    assert fields >= OPTIONS.keys()
    theirs = transformers.GenerationConfig._get_default_generation_params()
    ours = {name: option.default for name, option in OPTIONS.items() if name in theirs}
    assert ours == {name: theirs[name] for name in ours} | {"max_length": None}


def test_a_call_goes_before_the_checkpoint_and_that_before_the_config() -> None:
    stored = {"num_beams": 4, "eos_token_id": 7, "max_new_tokens": 9, "unknown": {"a": 1}}
    found = options_for(stored, {"num_beams": 2, "length_penalty": 0.5}, CONFIG)
    assert (found.num_beams, found.length_penalty, found.max_new_tokens) == (2, 0.5, 9)
    assert (found.eos_token_ids, found.pad_token_id) == ((7,), 5)
    assert options_for(stored, {"eos_token_id": None}, CONFIG).eos_token_ids == (3, 4)
    with pytest.warns(UserWarning, match="max_new_tokens = 9 goes before max_length"):
        assert options_for(stored, {"max_length": 30}, CONFIG).lengths(2) == (0, 11)
    unsaid = {"max_length": 30, "max_new_tokens": None}
    assert options_for(stored, unsaid, CONFIG).lengths(2) == (0, 30)
    with pytest.warns(UserWarning, match="min_new_tokens = 3 goes before min_length"):
        assert options_for({"min_new_tokens": 3}, {"min_length": 4}, CONFIG).lengths(1) == (4, 21)
    assert options_for({"max_length": 30}, {"max_new_tokens": 5}, CONFIG).lengths(2) == (0, 7)
    assert options_for({"min_length": 40}, {"max_new_tokens": 5}, CONFIG).lengths(2) == (40, 7)
    assert options_for({}, {}, CONFIG).lengths(3) == (0, 23)


UNFOLLOWABLE: dict[str, Any] = {
    **dict.fromkeys(("constraints", "force_words_ids"), [[1]]),
    **dict.fromkeys(("use_mtp", "is_assistant", "token_healing"), True),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit"), 3),
    "watermarking_config": {"bias": 2.0},
    "stop_strings": ["."],
    "dola_layers": "high",
    "guidance_scale": 1.5,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "cache_implementation": "quantized",
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_a_stored_field_that_cannot_be_followed_is_refused_by_name(name: str) -> None:
    beams = {"num_beams": 2} if name == "num_beam_groups" else {}
    stored = {name: UNFOLLOWABLE[name], **beams}
    with pytest.raises(ConfigError, match=f"no {name}.*pass {name}=None") as caught:
        options_for(stored, {}, CONFIG)
    assert caught.value.field == name
    assert len(str(caught.value)) < 300
    options_for(stored, {name: None}, CONFIG)


def test_fields_that_change_nothing_as_they_stand_are_let_be() -> None:
    neutral = {"num_beam_groups": 1, "guidance_scale": 1.0, "token_healing": False}
    options_for({**neutral, "penalty_alpha": 0.6, "do_sample": True}, {}, CONFIG)
    options_for({"num_beam_groups": 3, "diversity_penalty": 0.5}, {}, CONFIG)  # of one beam
    options_for({"cache_implementation": "static", "output_scores": True}, {}, CONFIG)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"num_beam": 2}, "num_beam"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"bad_words_ids": []}, "bad_words_ids"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
        ({"sequence_bias": {"(5, 6)": 1.0}}, "sequence_bias"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens"),
        ({"min_length": 9, "max_length": 8}, "min_length"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"forced_eos_token_id": 4, "suppress_tokens": [4]}, "forced_eos_token_id"),
        ({"temperature": 0, "do_sample": True}, "temperature"),
    ],
)
def test_bad_options_are_refused_by_name(said: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options_for({}, said, CONFIG)
    assert caught.value.field == field


def test_options_and_what_is_stored_can_not_be_changed() -> None:
    options = GenerationOptions(bad_words_ids=[[1, 2]])  # type: ignore[arg-type]
    assert hash(options) == hash(GenerationOptions(bad_words_ids=((1, 2),)))
    stored = StoredGeneration.of({"a": {"b": [1]}, "num_beams": 2})
    stored.values["a"]["b"].append(2)
    assert stored.values == {"a": {"b": [1]}, "num_beams": 2}
    assert stored.replace(num_beams=None, c=3).values == {"a": {"b": [1]}, "c": 3}
    with pytest.raises(dataclasses.FrozenInstanceError):
        stored.text = ""  # type: ignore[misc]
