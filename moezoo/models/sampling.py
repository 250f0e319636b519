"""Which token comes next: rules that change scores, and the choice itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.errors import ConfigError


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate; see `generate` for each option. Raises ConfigError naming the option."""

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    use_cache: bool = True

    def __post_init__(self) -> None:
        for name, low in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                wanted = f"a whole number >= {low}"
                raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))
        for name in ("temperature", "repetition_penalty", "top_p", "length_penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or (value <= 0 and name != "length_penalty"):
                wanted = "a finite number" if name == "length_penalty" else "a finite number > 0"
                raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))
        if self.top_p > 1.0:
            raise ConfigError("top_p lies in (0, 1]", field="top_p", found=self.top_p)
        for name in ("do_sample", "use_cache", "early_stopping"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name, value) != ("early_stopping", "never"):
                wanted = "true, false" + (' or "never"' if name == "early_stopping" else "")
                raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))
        self._check_together()

    def _check_together(self) -> None:
        if self.do_sample and self.num_beams > 1:
            hint = "Sample with num_beams=1, or search with do_sample=False."
            raise ConfigError(
                "sampling and beam search exclude each other", field="num_beams", hint=hint
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            hint = "Raise num_beams, or pass do_sample=True."
            found = self.num_return_sequences
            reason = "num_return_sequences is larger than num_beams"
            raise ConfigError(reason, field="num_return_sequences", found=found, hint=hint)
        if self.min_new_tokens > self.max_new_tokens:
            reason = f"min_new_tokens is larger than max_new_tokens = {self.max_new_tokens}"
            raise ConfigError(reason, field="min_new_tokens", found=self.min_new_tokens)


_WHOLE_NUMBERS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
}


def adjusted(scores: Tensor, ids: Tensor, options: GenerationOptions, eos: int) -> Tensor:
    """Scores (B, V) after the rules that look at the tokens so far (B, L), the start token
    included.
    """
    if options.repetition_penalty != 1.0:
        seen = scores.gather(1, ids)
        penalty = options.repetition_penalty
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        scores = scores.scatter(1, ids, seen)
    if options.no_repeat_ngram_size:
        scores = scores.masked_fill(_repeats(ids, scores, options.no_repeat_ngram_size), -torch.inf)
    if ids.shape[1] - 1 < options.min_new_tokens:
        scores = scores.clone()
        scores[:, eos] = -torch.inf
    return scores


def sampled(scores: Tensor, options: GenerationOptions) -> Tensor:
    """One token (B,) drawn from scores (B, V) after temperature, top-k and top-p."""
    scores = scores / options.temperature
    if options.top_k:
        kth = scores.topk(min(options.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if options.top_p < 1.0:
        ordered, order = scores.sort(dim=-1)
        # Drop the unlikely tail whose mass is at most 1 - top_p; the likeliest token always stays.
        tail = ordered.softmax(-1).cumsum(-1) <= 1.0 - options.top_p
        tail[:, -1] = False
        scores = scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1)


def _repeats(ids: Tensor, scores: Tensor, size: int) -> Tensor:
    """True (B, V) for tokens that would complete an n-gram seen before."""
    count = torch.zeros_like(scores, dtype=torch.int32)
    length = ids.shape[1]
    if length < size:
        return count > 0
    grams = ids.unfold(1, size, 1)
    repeated = (grams[:, :, :-1] == ids[:, None, length - size + 1 :]).all(-1)
    return count.scatter_add(1, grams[:, :, -1], repeated.to(torch.int32)) > 0
