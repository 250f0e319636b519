"""transformers' generate over a wrapped model: caches in and out, and ways of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import moezoo
from moezoo.adapters.hf import MoezooForConditionalGeneration
from moezoo.adapters.hf.outputs import CACHE
from moezoo.config import SwitchConfig

from .tiny import SIZES, batch, wrapped


def source(rows: int = 3) -> dict[str, Tensor]:
    return {name: x for name, x in batch(rows).items() if name != "labels"}


def greedy(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    found: Tensor = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"stop_strings": None},
    ],
    ids=str,
)
def test_every_cache_gives_the_same_tokens(options: dict[str, Any]) -> None:
    model = wrapped()
    beams = {"num_beams": options.get("num_beams", 1)}
    assert torch.equal(
        greedy(model, source(), **{**beams, **options}), greedy(model, source(), **beams)
    )


def test_static_caches_are_compiled_with_the_model() -> None:
    from transformers import CompileConfig

    model = wrapped()
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    found = greedy(model, source(), cache_implementation="static", compile_config=config)
    assert torch.equal(found, greedy(model, source()))
    whole = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.tensor([[0, 5]] * 3)
    torch.testing.assert_close(
        whole(**source(), decoder_input_ids=ids).logits,
        model(**source(), decoder_input_ids=ids).logits,
    )


@pytest.mark.parametrize("kind", ["dynamic", "static", "decoder only"])
def test_steps_with_a_cache_equal_the_whole(kind: str) -> None:
    model, inputs = wrapped(), source()
    ids = torch.tensor([[0, 5, 6, 7, 8]] * 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    whole = model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
    cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if kind == "static":
        lengths = (9, inputs["input_ids"].shape[1])
        cache = EncoderDecoderCache(*(StaticCache(model.config, max_cache_len=n) for n in lengths))
    elif kind == "decoder only":
        cache = DynamicCache()
    parts = [
        model(
            **inputs, decoder_input_ids=ids[:, a:b], decoder_attention_mask=mask[:, :b],
            **{CACHE: cache},
        ).logits
        for a, b in ((0, 2), (2, 3), (3, 5))
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    assert int(cache.get_seq_length()) == 5


def test_a_cropped_cache_goes_on_from_there() -> None:
    model, inputs = wrapped(), source()
    ids = torch.tensor([[0, 5, 6, 7]] * 3)
    first = model(**inputs, decoder_input_ids=ids)
    first[CACHE].crop(-2)
    again = model(**inputs, decoder_input_ids=ids[:, 2:], **{CACHE: first[CACHE]})
    torch.testing.assert_close(again.logits, first.logits[:, 2:], atol=1e-5, rtol=1e-4)


def test_generation_continues_from_a_cache() -> None:
    model, inputs = wrapped(), source()
    whole = greedy(model, inputs)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    rest = model.generate(
        **inputs, max_new_tokens=5, decoder_input_ids=first.sequences,
        **{CACHE: first[CACHE]},
    )  # fmt: skip
    assert torch.equal(rest, whole)


def test_assistants_and_prompt_lookup_change_no_token() -> None:
    model, inputs = wrapped(), source(1)
    small = SwitchConfig(**{**SIZES, "num_layers": 1, "num_experts": 0})
    assistant = MoezooForConditionalGeneration.wrap(moezoo.build(small, seed=3))
    expected = greedy(model, inputs)
    assert torch.equal(greedy(model, inputs, assistant_model=assistant), expected)
    assert torch.equal(greedy(model, inputs, assistant_model=model), expected)
    assert torch.equal(greedy(model, inputs, prompt_lookup_num_tokens=2), expected)


def test_generation_starts_from_embeddings_or_from_the_encoders_output() -> None:
    model, inputs = wrapped(), source()
    expected, mask = greedy(model, inputs), inputs["attention_mask"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    encoded = model.encoder(**inputs)
    assert torch.equal(greedy(model, {"inputs_embeds": embeds, "attention_mask": mask}), expected)
    assert torch.equal(greedy(model, {"attention_mask": mask}, encoder_outputs=encoded), expected)


def test_what_is_asked_of_every_step_is_there() -> None:
    model = wrapped()
    found = model.generate(
        **source(), max_new_tokens=4, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_attentions=True, output_hidden_states=True,
    )  # fmt: skip
    steps = found.sequences.shape[1] - 1
    assert len(found.scores) == len(found.logits) == len(found.decoder_attentions) == steps
    assert found.decoder_attentions[1][0].shape == (3, 4, 1, 2)
    assert found.cross_attentions[0][1].shape == (3, 4, 1, 7)
    assert len(found.encoder_hidden_states) == len(found.decoder_hidden_states[0]) == 3
    assert isinstance(found[CACHE], EncoderDecoderCache)


def test_stop_strings_end_a_text() -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(96)}, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    model, inputs = wrapped(), source(1)
    whole = greedy(model, inputs)[0].tolist()
    stop = chr(33 + whole[4])
    found = greedy(model, inputs, stop_strings=[stop], tokenizer=tokenizer)
    assert found[0].tolist() == whole[: whole.index(whole[4]) + 1]


def test_what_generate_is_told_reaches_the_model_or_is_refused() -> None:
    model, ids = wrapped(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    made = model.prepare_inputs_for_generation(ids, output_attentions=True, of_their_own=42)
    assert torch.equal(made["decoder_input_ids"], ids)
    assert (made["output_attentions"], made["of_their_own"]) == (True, 42)
    for name in ("position_ids", "cu_seq_lens_q"):  # known to transformers, which lets them through
        with pytest.raises(TypeError, match=name):
            greedy(model, source(2), **{name: ids})


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"watermarking_config": {"greenlist_ratio": 0.5}},
        {"decoder_input_ids": torch.tensor([[0, 5, 6]] * 3)},
        {"forced_eos_token_id": 1, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_options_of_generation_are_followed(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    found = wrapped().generate(**source(), max_new_tokens=5, **options)
    prompt = options.get("decoder_input_ids", torch.zeros(3, 1)).shape[1]
    assert found.shape[0] == 3 * options.get("num_return_sequences", 1)
    assert prompt < found.shape[1] <= prompt + 5
    if "forced_eos_token_id" in options:
        assert (found == 1).any(1).all()
