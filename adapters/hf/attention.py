"""Attention of a wrapped model: the implementation that its config names, and its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moezoo.functional.dropout import dropout
from moezoo.models.attention import Attention
from moezoo.models.cache import DecoderCache


class ChosenAttention(Attention):
    """Attention as `config._attn_implementation` says: "sdpa" (moezoo's own, fused), "eager" (its
    weights are there), or a function that is registered with transformers.

    Who wants the weights (B, H, L, Lk) sets `keep`; they come from the eager one then.
    """

    settings: Any  # the config of the wrapped model
    keep: Callable[[Tensor], None] | None = None

    def cross(
        self, x: Tensor, memory: Tensor, bias: Tensor | None, cache: DecoderCache | None = None
    ) -> Tensor:
        """As `Attention.cross`; whose weights are wanted has its rows of memory repeated."""
        rows = x.shape[0]
        if self.keep is not None and memory.shape[0] != rows:
            repeats = rows // memory.shape[0]
            memory = memory.repeat_interleave(repeats, 0)
            bias = None if bias is None else bias.repeat_interleave(repeats, 0)
        return super().cross(x, memory, bias, cache)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        name = self.settings._attn_implementation or "sdpa"
        if self.keep is None and (name == "sdpa" or key.shape[2] == 0):
            return super()._attend(query, key, value, bias)
        rate = self.dropout if self.training else 0.0
        if self.keep is None and name != "eager":
            function = ALL_ATTENTION_FUNCTIONS[name]
            mixed, _ = function(self, query, key, value, bias, dropout=rate, scaling=1.0)
            found: Tensor = mixed.transpose(1, 2)
            return found
        drop = partial(dropout, p=rate, training=self.training)
        weights = drop(attention_weights(query, key, bias)).to(value.dtype)
        if self.keep is not None:
            self.keep(weights)
        return weights @ value


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) of (B, H, L, dk) and (B, H, Lk, dk): (B, H, L, Lk)."""
    scores = query @ key.transpose(2, 3)
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(-1)
