"""Generation: options, sampling, beams that share their source, what comes after eos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.generation_options import GenerationOptions
from moezoo.models.cache import DecoderCache
from moezoo.models.logits_rules import Prompt, applied, rules_of
from moezoo.models.sampling import drawn, warpers_of
from tests.models.tiny import source, tiny


def test_a_row_generates_the_same_alone_and_in_a_batch() -> None:
    model, ids = tiny(), source(4)
    for beams in (1, 3):
        together = model.generate(ids, num_beams=beams, max_new_tokens=8)
        for row in range(4):
            alone = model.generate(ids[row : row + 1], num_beams=beams, max_new_tokens=8)
            assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_source_padding_changes_no_generated_token() -> None:
    model, ids = tiny(), source(2, 5)
    padded = torch.cat([ids, torch.full((2, 3), 9)], 1)
    mask = torch.cat([torch.ones(2, 5), torch.zeros(2, 3)], 1).long()
    for beams in (1, 3):
        expected = model.generate(ids, num_beams=beams)
        assert torch.equal(model.generate(padded, mask, num_beams=beams), expected)


def test_generation_equals_teacher_forcing() -> None:
    model, ids = tiny(), source(3)
    out = model.generate(ids, max_new_tokens=9, min_new_tokens=9)
    forced = model(ids, decoder_input_ids=out[:, :-1]).logits
    forced[..., 1] = -torch.inf
    assert torch.equal(forced.argmax(-1), out[:, 1:])


def test_a_cache_that_grows_past_its_buffer_keeps_every_key() -> None:
    model, ids = tiny(), source(1)
    target = source(1, 70, seed=2)
    whole = model(ids, decoder_input_ids=target).logits
    cache, memory, parts = DecoderCache(), None, []
    for position in range(70):
        out = model(
            None if memory is not None else ids,
            decoder_input_ids=target[:, position : position + 1],
            encoder_last_hidden_state=memory,
            past_key_values=cache,
        )
        memory = out.encoder_last_hidden_state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert cache.length == 70


def test_use_cache_returns_a_cache_that_continues() -> None:
    model, ids, target = tiny(), source(), source(2, 4, seed=1)
    whole = model(ids, decoder_input_ids=target).logits
    first = model(ids, decoder_input_ids=target[:, :3], use_cache=True)
    second = model(
        decoder_input_ids=target[:, 3:],
        encoder_last_hidden_state=first.encoder_last_hidden_state,
        past_key_values=first.past_key_values,
    )
    torch.testing.assert_close(second.logits, whole[:, 3:], atol=1e-5, rtol=1e-5)
    assert model(ids, decoder_input_ids=target).past_key_values is None


def sampled(scores: Tensor, **options: Any) -> Tensor:
    rules = warpers_of(GenerationOptions(do_sample=True, **options))
    return drawn(applied(rules, scores[:, :0].long(), scores))[:, 0]


def ruled(scores: Tensor, ids: Tensor, **options: Any) -> Tensor:
    """Scores by rules where the decoder began with the first of ids."""
    chosen = GenerationOptions(eos_token_id=1, **options)
    return applied(rules_of(chosen, Prompt(ids[:, :1]), vocabulary=8), ids, scores)


def test_top_k_and_top_p_keep_the_likeliest_tokens_only() -> None:
    torch.manual_seed(0)
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    assert set(sampled(scores, top_k=2).tolist()) == {0, 1}
    assert set(sampled(scores, top_p=0.7).tolist()) == {0, 1}
    assert set(sampled(scores, top_p=0.01).tolist()) == {0}
    drawn = sampled(scores).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, scores[0].exp(), atol=0.04, rtol=0)
    warm = sampled(scores, temperature=0.25).bincount() / 4000
    assert warm[0] > 0.8


def test_rules_forbid_what_they_say() -> None:
    ids = torch.tensor([[0, 5, 6, 5]])
    scores = torch.zeros(1, 8)
    no_bigram = ruled(scores, ids, no_repeat_ngram_size=2)
    assert no_bigram.isinf().nonzero().tolist() == [[0, 6]]
    too_short = ruled(scores, ids, min_new_tokens=4)
    assert too_short.isinf().nonzero().tolist() == [[0, 1]]
    assert not ruled(scores, ids, min_new_tokens=3).isinf().any()
    found = ruled(torch.tensor([[1.0, 1, 1, 1, 1, 4, -4, 1]]), ids, repetition_penalty=2.0)
    assert found.tolist() == [[0.5, 1, 1, 1, 1, 2, -8, 1]]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"min_new_tokens": 30}, "min_new_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], field: str) -> None:
    with pytest.raises(moezoo.MoezooError) as caught:
        tiny().generate(source(), **options)
    assert caught.value.field == field
    assert repr(next(iter(options.values()))) in str(caught.value)


def test_generated_ids_can_be_trained_on() -> None:
    model, ids = tiny().train(), source()
    labels = model.generate(ids, max_new_tokens=4)
    model(ids, labels=labels).loss.backward()
    assert model.shared.weight.grad is not None


def test_generation_of_empty_batches_and_sources_works() -> None:
    model = tiny()
    for beams in (1, 2):
        assert model.generate(source(0, 4), num_beams=beams).shape[0] == 0
        assert model.generate(source(2, 0), num_beams=beams).shape[0] == 2
        none = torch.zeros(2, 3, dtype=torch.long)
        assert model.generate(source(2, 3), none, num_beams=beams).shape[0] == 2


class Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_prompt_and_every_token() -> None:
    heard = Heard()
    found = tiny().generate(source(3), max_new_tokens=6, streamer=heard)
    assert torch.equal(torch.cat([heard.values[0], torch.stack(heard.values[1:], 1)], 1), found)
    assert heard.ended
    with pytest.raises(moezoo.MoezooError, match="nothing to stream"):
        tiny().generate(source(), num_beams=2, streamer=Heard())


def test_transformers_streamers_processors_and_criteria_work() -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = tiny(), source(1)
    banned = transformers.LogitsProcessorList(
        [transformers.SuppressTokensLogitsProcessor(list(range(5, 61)))]
    )
    stop = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(max_length=4)])
    for beams in (1, 3):
        asked = {"num_beams": beams, "logits_processor": banned, "stopping_criteria": stop}
        found = model.generate(ids, **asked, min_new_tokens=6)
        assert found.shape[1] == 4
        assert int(found.max()) < 5


@pytest.mark.parametrize("beams", [1, 3])
def test_criteria_of_rows_end_those_rows(beams: int) -> None:
    model, ids = tiny(eos_token_id=()), source(3)

    def after_four(ids: Tensor, scores: object) -> Tensor:
        return torch.tensor(ids.shape[1] >= 4).expand(ids.shape[0])

    asked = {"num_beams": beams, "max_new_tokens": 9}
    assert model.generate(ids, **asked).shape[1] == 10
    assert model.generate(ids, **asked, stopping_criteria=[after_four]).shape[1] == 4
    assert model.generate(ids, **asked, max_time=0.0).shape[1] == 2
    with pytest.raises(moezoo.MoezooError, match="takes functions"):
        model.generate(ids, stopping_criteria=[7])


def test_rules_of_the_caller_come_last_and_return_scores() -> None:
    model, ids = tiny(), source(2)
    only_seven = torch.full((61,), -torch.inf).index_fill(0, torch.tensor([7]), 0.0)
    found = model.generate(
        ids, logits_processor=lambda ids, scores: scores + only_seven, max_new_tokens=3
    )
    assert found[:, 1:].tolist() == [[7, 7, 7]] * 2
    with pytest.raises(moezoo.MoezooError, match="returned no scores"):
        model.generate(ids, logits_processor=lambda ids, scores: None)
    allowed = {0: [5, 6], 1: [8]}
    found = model.generate(
        ids, num_beams=2, max_new_tokens=3, prefix_allowed_tokens_fn=lambda row, _: allowed[row]
    )
    assert set(found[0, 1:].tolist()) <= {5, 6}
    assert set(found[1, 1:].tolist()) == {8}


@pytest.mark.parametrize("beams", [1, 2])
def test_a_generator_of_its_own_draws_the_same_again(beams: int) -> None:
    model, ids = tiny(), source(2)
    state = torch.get_rng_state()
    asked = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8, "num_beams": beams}
    first, second = (
        model.generate(ids, **asked, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_of_greedy_search_add_up_over_what_was_generated() -> None:
    model, ids = tiny(), source(3)
    found = model.generate(ids, max_new_tokens=6, return_scores=True)
    expected = []
    for row, tokens in enumerate(found.sequences[:, 1:].tolist()):
        end = tokens.index(1) + 1 if 1 in tokens else len(tokens)
        steps = range(end)
        expected.append(sum(found.scores[s].log_softmax(-1)[row, tokens[s]] for s in steps))
    torch.testing.assert_close(found.sequences_scores, torch.tensor(expected))


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"decoder_input_ids": torch.zeros(3, 2).long()}, "decoder_input_ids"),
        ({"decoder_input_ids": torch.full((2, 2), 61)}, "decoder_input_ids"),
        ({"decoder_input_ids": torch.zeros(2, 25).long(), "max_length": 25}, "max_length"),
        ({"decoder_attention_mask": torch.ones(2, 1)}, "decoder_attention_mask"),
        ({"bad_words_ids": [[3, 61]]}, "bad_words_ids"),
        ({"decoder_start_token_id": 61}, "decoder_start_token_id"),
        ({"num_beam": 2}, "num_beam"),
    ],
)
def test_impossible_prompts_and_ids_are_named(inputs: dict[str, Any], field: str) -> None:
    with pytest.raises(moezoo.MoezooError) as caught:
        tiny().generate(source(), **inputs)
    assert caught.value.field == field


def test_what_looks_at_the_source_needs_its_ids() -> None:
    model, ids = tiny(), source()
    embeds = model.shared(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds), model.generate(ids))
    for name, value in (("encoder_repetition_penalty", 1.5), ("encoder_no_repeat_ngram_size", 2)):
        with pytest.raises(moezoo.MoezooError, match=f"{name} looks at the source's ids"):
            model.generate(inputs_embeds=embeds, **{name: value})


@pytest.mark.parametrize("beams", [1, 3])
def test_a_search_asks_the_device_once_a_step(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a device: truth, numbers and lists of tensors."""
    model, ids = tiny(num_experts=0), source(4)
    waits: list[str] = []
    for name in ("__bool__", "item", "tolist", "__float__", "__int__", "nonzero"):
        method = getattr(Tensor, name)

        def counted(self: Tensor, *inputs: Any, name: str = name, method: Any = method) -> Any:
            waits.append(name)
            return method(self, *inputs)

        monkeypatch.setattr(Tensor, name, counted)
    numbers = []
    for steps in (3, 8):
        waits.clear()
        asked = {"max_new_tokens": steps, "min_new_tokens": steps, "num_beams": beams}
        model.generate(ids, **asked, repetition_penalty=1.2, no_repeat_ngram_size=2)
        numbers.append(len(waits))
    assert numbers[1] - numbers[0] == 5
