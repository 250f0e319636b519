"""Span corruption, the pre-training task of T5 (arXiv 1910.10683, section 3.1.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moezoo.errors import ConfigError


class Sentinels(Protocol):
    """What span corruption needs of a tokenizer."""

    @property
    def num_sentinels(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def mean_span(self) -> float: ...

    def sentinel(self, index: int) -> int: ...


def noise_mask(
    length: int, *, density: float, mean_span: float, generator: torch.Generator
) -> Tensor:
    """Which of `length` tokens are noise (length,) bool, as t5's `random_spans_noise_mask` draws
    it.

    round(length * density) tokens, at least one and never all, in round(noise / mean_span) spans of
    random lengths; it starts with a span that is kept.
    """
    if length < 2:
        return torch.zeros(length, dtype=torch.bool, device="cpu")
    noise, spans = _noise_and_spans(length, density, mean_span)
    kept_S = _segments(length - noise, spans, generator)
    noise_S = _segments(noise, spans, generator)
    lengths = torch.stack([kept_S, noise_S], dim=1).view(-1)
    flags = torch.tensor([False, True], device="cpu").repeat(spans)
    return flags.repeat_interleave(lengths)


@dataclass(frozen=True)
class SpanCorruption:
    """Replace spans by sentinels; the target says what stood there.

    Args:
        tokenizer: gives the sentinels and eos, which closes source and target. density: share of
            noise tokens (0.15). mean_span: their mean length; None: what the tokenizer's family
            was pre-trained with (3, ByT5 20).

    Raises ConfigError for a text of more spans than there are sentinels: t5 goes on with ids of
    ordinary pieces there, which say nothing of what they stand for.
    """

    tokenizer: Sentinels
    density: float = 0.15
    mean_span: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.density < 1.0:
            raise ConfigError("density lies in (0, 1)", field="density", found=self.density)
        if not 1.0 <= self.span_length < math.inf:
            raise ConfigError("mean_span is at least 1", field="mean_span", found=self.mean_span)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Source and target ids of a text (L,), both closed by eos."""
        length, mean_span = ids.shape[0], self.span_length
        self.check_length(length)
        mask = noise_mask(length, density=self.density, mean_span=mean_span, generator=generator)
        eos = self.tokenizer.eos_id
        source = self._with_sentinels(ids, mask)
        target = self._with_sentinels(ids, ~mask)
        return [*source, eos], [*target, eos]

    def check_length(self, length: int) -> None:
        """Raises ConfigError for a text of more spans than there are sentinels."""
        spans = _noise_and_spans(length, self.density, self.span_length)[1] if length > 1 else 0
        if spans > self.tokenizer.num_sentinels:
            hint = "Shorten the input (--input-length, --length), or lengthen spans (--mean-span)."
            if not self.tokenizer.num_sentinels:
                hint = "Say extra_ids in tokenizer_config.json, or name another tokenizer."
            raise ConfigError(
                f"a text of {length} tokens has {spans} masked spans, more than the tokenizer has "
                "sentinels",
                field="tokenizer",
                expected=f"at most {self.tokenizer.num_sentinels}",
                found=spans,
                hint=hint,
            )

    def chunk_length(self, input_length: int) -> int:
        """The longest text whose corrupted source has at most `input_length` tokens with eos."""
        length = max(input_length, 3)
        while self._source_length(length + 1) <= input_length:
            length += 1
        while length > 2 and self._source_length(length) > input_length:
            length -= 1
        return length

    @property
    def span_length(self) -> float:
        """Mean tokens per span, as given or as the tokenizer's family was pre-trained with."""
        return self.tokenizer.mean_span if self.mean_span is None else self.mean_span

    def _source_length(self, length: int) -> int:
        noise, spans = _noise_and_spans(length, self.density, self.span_length)
        return length - noise + spans + 1

    def _with_sentinels(self, ids: Tensor, dropped: Tensor) -> list[int]:
        """The ids with each run of dropped ones replaced by the next sentinel."""
        out: list[int] = []
        count, inside = 0, False
        for number, drop in zip(ids.tolist(), dropped.tolist(), strict=True):
            if not drop:
                out.append(number)
            elif not inside:
                out.append(self.tokenizer.sentinel(count))
                count += 1
            inside = drop
        return out


def _noise_and_spans(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """How many of at least two tokens are noise, and in how many spans."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def _segments(items: int, segments: int, generator: torch.Generator) -> Tensor:
    """Lengths (segments,) >= 1 that sum to items, every division equally likely."""
    cuts = torch.randperm(items - 1, generator=generator, device="cpu")[: segments - 1] + 1
    edges = torch.cat([cuts.new_tensor([0]), cuts.sort().values, cuts.new_tensor([items])])
    return edges.diff()
