"""Span corruption: the published statistics, and nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moezoo
from moezoo.training.batches import span_corruption_batches
from moezoo.training.span_corruption import SpanCorruption, noise_mask
from tests.training.text import tokenizer


def runs(mask: torch.Tensor) -> int:
    """How many runs of True a mask has."""
    return int(mask[0]) + int((mask[1:] & ~mask[:-1]).sum())


@given(
    length=st.integers(0, 300),
    density=st.floats(0.01, 0.99),
    mean=st.floats(1.0, 10.0),
    seed=st.integers(0, 2**30),
)
def test_noise_has_the_published_number_of_tokens_and_spans(
    length: int, density: float, mean: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = noise_mask(length, density=density, mean_span=mean, generator=generator)
    assert mask.shape == (length,)
    if length < 2:
        assert not mask.any()
        return
    noise = min(max(round(length * density), 1), length - 1)
    assert int(mask.sum()) == noise
    assert runs(mask) == min(max(round(noise / mean), 1), noise, length - noise)
    assert not mask[0], "the first span is kept"
    assert mask[-1], "the last one is noise"


def reference_mask(
    length: int, density: float, mean: float, generator: torch.Generator
) -> list[bool]:
    """t5's random_spans_noise_mask, line by line."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean), 1)

    def segmentation(items: int, count: int) -> list[int]:
        first = [i < count - 1 for i in range(items - 1)]
        order = torch.randperm(items - 1, generator=generator).tolist()
        starts = [True, *(first[i] for i in order)]
        sizes: list[int] = []
        for start in starts:
            if start:
                sizes.append(0)
            sizes[-1] += 1
        return sizes

    noisy, kept = segmentation(noise, spans), segmentation(length - noise, spans)
    mask: list[bool] = []
    for a, b in zip(kept, noisy, strict=True):
        mask += [False] * a + [True] * b
    return mask


def test_the_distribution_equals_that_of_t5() -> None:
    ours, theirs = torch.zeros(2, 64), torch.zeros(2, 64)
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    for _ in range(draws):
        for sums, mask in (
            (ours, noise_mask(64, density=0.15, mean_span=3.0, generator=generator)),
            (theirs, torch.tensor(reference_mask(64, 0.15, 3.0, generator))),
        ):
            sums[0] += mask
            sums[1, 1:] += mask[1:] & mask[:-1]  # pairs tell the lengths of spans
    # Each count is binomial: six standard deviations of the difference of two means.
    tolerance = 6 * (2 * 0.25 / draws) ** 0.5
    assert ((ours - theirs) / draws).abs().max() < tolerance


@given(length=st.integers(2, 200), seed=st.integers(0, 2**30))
def test_source_and_target_together_hold_every_token_once(length: int, seed: int) -> None:
    corruption = SpanCorruption(tokenizer())
    ids = torch.arange(2, 2 + length) % 390 + 3
    source, target = corruption(ids, torch.Generator().manual_seed(seed))
    assert source[-1] == target[-1] == 1
    sentinels = [tokenizer().sentinel(i) for i in range(100)]
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    rebuilt = [t for token in source[:-1] for t in spans.get(token, [token])]
    assert rebuilt == ids.tolist()
    assert list(spans) == sentinels[: len(spans)], "sentinels count up from the first"


@given(st.integers(8, 600))
def test_a_chunk_fills_its_source_and_never_overflows(input_length: int) -> None:
    corruption = SpanCorruption(tokenizer())
    length = corruption.chunk_length(input_length)
    source, _ = corruption(torch.full((length,), 5), torch.Generator().manual_seed(0))
    assert len(source) <= input_length
    longer, _ = corruption(torch.full((length + 1,), 5), torch.Generator().manual_seed(0))
    assert len(longer) > input_length


def test_published_lengths() -> None:
    assert SpanCorruption(tokenizer()).chunk_length(512) == 568
    source, target = SpanCorruption(tokenizer())(torch.full((568,), 5), torch.Generator())
    assert (len(source), len(target)) == (512, 114)


def test_sentinels_eos_and_span_length_are_those_of_the_tokenizer() -> None:
    ours = SpanCorruption(moezoo.ByteTokenizer())
    source, target = ours(torch.full((600,), 100), torch.Generator().manual_seed(0))
    spans = round(600 * 0.15 / 20)
    assert [token for token in target if token != 100] == [*range(258, 258 - spans, -1), 1]
    assert (len(source), len(target)) == (600 - 90 + spans + 1, 90 + spans + 1)
    assert ours.chunk_length(1024) > 1024
    shorter = SpanCorruption(moezoo.ByteTokenizer(), mean_span=30.0)
    source, _ = shorter(torch.full((600,), 100), torch.Generator().manual_seed(0))
    assert len(source) == 600 - 90 + 3 + 1


def test_more_spans_than_sentinels_are_refused_with_both_numbers() -> None:
    ours = SpanCorruption(tokenizer())
    source, target = ours(torch.full((2000,), 5), torch.Generator())
    sentinels = [tokenizer().sentinel(i) for i in range(100)]
    assert [token for token in target if token in sentinels] == sentinels
    with pytest.raises(moezoo.MoezooError, match="at most 100, found 101") as caught:
        ours(torch.full((2020,), 5), torch.Generator())
    assert "--mean-span" in str(caught.value)
    assert len(str(caught.value)) < 300
    ids = torch.arange(5000) % 300
    with pytest.raises(moezoo.MoezooError, match="masked spans"):
        span_corruption_batches(ids, ours, input_length=4000, batch_size=1)


def test_a_tokenizer_without_sentinels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "any.model").write_bytes(tokenizer().path.read_bytes())
    ours = SpanCorruption(moezoo.Tokenizer(tmp_path / "any.model", num_sentinels=0))
    with pytest.raises(moezoo.MoezooError, match="extra_ids"):
        ours(torch.full((20,), 5), torch.Generator())


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.0}, {"mean_span": 0.5}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(moezoo.MoezooError, match=next(iter(options))):
        SpanCorruption(tokenizer(), **options)
