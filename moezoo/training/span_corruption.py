"""Span corruption, the pre-training task of T5 (arXiv 1910.10683, section 3.1.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moezoo.errors import ConfigError


class Sentinels(Protocol):
    """What span corruption needs of a tokenizer."""

    num_sentinels: int

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
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    kept_S = _segments(length - noise, spans, generator)
    noise_S = _segments(noise, spans, generator)
    lengths = torch.stack([kept_S, noise_S], dim=1).view(-1)
    flags = torch.tensor([False, True], device="cpu").repeat(spans)
    return flags.repeat_interleave(lengths)


@dataclass(frozen=True)
class SpanCorruption:
    """Replace spans by sentinels; the target says what stood there.

    Args:
        tokenizer: gives the sentinels. density: share of noise tokens (0.15). mean_span: their mean
            length (3). eos: closes source and target.
    """

    tokenizer: Sentinels
    density: float = 0.15
    mean_span: float = 3.0
    eos: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.density < 1.0:
            raise ConfigError("density lies in (0, 1)", field="density", found=self.density)
        if self.mean_span < 1.0:
            raise ConfigError("mean_span is at least 1", field="mean_span", found=self.mean_span)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Source and target ids of a text (L,), both closed by eos."""
        mask = noise_mask(
            ids.shape[0], density=self.density, mean_span=self.mean_span, generator=generator
        )
        source = self._with_sentinels(ids, mask)
        target = self._with_sentinels(ids, ~mask)
        return [*source, self.eos], [*target, self.eos]

    def chunk_length(self, input_length: int) -> int:
        """The longest text whose corrupted source has at most `input_length` tokens with eos."""
        length = max(input_length, 3)
        while self._source_length(length + 1) <= input_length:
            length += 1
        while length > 2 and self._source_length(length) > input_length:
            length -= 1
        return length

    def _source_length(self, length: int) -> int:
        noise = min(max(round(length * self.density), 1), length - 1)
        spans = min(max(round(noise / self.mean_span), 1), noise, length - noise)
        return length - noise + spans + 1

    def _with_sentinels(self, ids: Tensor, dropped: Tensor) -> list[int]:
        """The ids with each run of dropped ones replaced by the next sentinel."""
        out: list[int] = []
        count, inside = 0, False
        for number, drop in zip(ids.tolist(), dropped.tolist(), strict=True):
            if not drop:
                out.append(number)
            elif not inside:
                out.append(self.tokenizer.sentinel(count % self.tokenizer.num_sentinels))
                count += 1
            inside = drop
        return out


def _segments(items: int, segments: int, generator: torch.Generator) -> Tensor:
    """Lengths (segments,) >= 1 that sum to items, every division equally likely."""
    cuts = torch.randperm(items - 1, generator=generator, device="cpu")[: segments - 1] + 1
    edges = torch.cat([cuts.new_tensor([0]), cuts.sort().values, cuts.new_tensor([items])])
    return edges.diff()
