"""Generation: options, sampling, beams that share their source, what comes after eos."""

from __future__ import annotations

import pytest
import torch

import moezoo
from moezoo.models.cache import DecoderCache
from moezoo.models.sampling import GenerationOptions, adjusted, sampled
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


def test_top_k_and_top_p_keep_the_likeliest_tokens_only() -> None:
    torch.manual_seed(0)
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    assert set(sampled(scores, GenerationOptions(do_sample=True, top_k=2)).tolist()) == {0, 1}
    assert set(sampled(scores, GenerationOptions(do_sample=True, top_p=0.7)).tolist()) == {0, 1}
    assert set(sampled(scores, GenerationOptions(do_sample=True, top_p=0.01)).tolist()) == {0}
    drawn = sampled(scores, GenerationOptions(do_sample=True)).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, scores[0].exp(), atol=0.04, rtol=0)
    warm = sampled(scores, GenerationOptions(do_sample=True, temperature=0.25)).bincount() / 4000
    assert warm[0] > 0.8


def test_rules_forbid_what_they_say() -> None:
    ids = torch.tensor([[0, 5, 6, 5]])
    scores = torch.zeros(1, 8)
    no_bigram = adjusted(scores, ids, GenerationOptions(no_repeat_ngram_size=2), eos=1)
    assert no_bigram.isinf().nonzero().tolist() == [[0, 6]]
    too_short = adjusted(scores, ids, GenerationOptions(min_new_tokens=4), eos=1)
    assert too_short.isinf().nonzero().tolist() == [[0, 1]]
    assert not adjusted(scores, ids, GenerationOptions(min_new_tokens=3), eos=1).isinf().any()
    penalty = GenerationOptions(repetition_penalty=2.0)
    found = adjusted(torch.tensor([[1.0, 1, 1, 1, 1, 4, -4, 1]]), ids, penalty, eos=1)
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
