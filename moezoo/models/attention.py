"""T5 attention: no scaling by sqrt(d), no biases, an additive position bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.config import SwitchConfig
from moezoo.models.cache import DecoderCache
from moezoo.models.position import PositionBias


class Attention(nn.Module):
    """Multi-head attention of T5 (arXiv 1910.10683) on `scaled_dot_product_attention`.

    Args:
        config: widths, heads, buckets, dropout.
        decoder: causal self-attention with one-sided position buckets.
        layer: index in its stack, the key into a cache.
        position_bias: own a table of relative position biases.
    """

    def __init__(
        self, config: SwitchConfig, *, decoder: bool, layer: int, position_bias: bool = False
    ) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads, self.d_kv, self.layer = config.num_heads, config.d_kv, layer
        self.dropout = config.dropout_rate
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.position_bias = (
            PositionBias(
                config.relative_attention_num_buckets,
                config.num_heads,
                max_distance=config.relative_attention_max_distance,
                bidirectional=not decoder,
            )
            if position_bias
            else None
        )

    def forward(self, x: Tensor, bias: Tensor | None, cache: DecoderCache | None = None) -> Tensor:
        """Self-attention: x (B, L, D), bias (1 or B, H or 1, L, Lk) additive or None -> (B, L,
        D).
        """
        key, value = self._heads(self.k(x)), self._heads(self.v(x))
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        return self._attend(x, key, value, bias)

    def cross(
        self, x: Tensor, memory: Tensor, bias: Tensor | None, cache: DecoderCache | None = None
    ) -> Tensor:
        """Attention to the encoder's output: x (B, L, D), memory (B, Lm, D) -> (B, L, D)."""
        pair = None if cache is None else cache.cross_attention.get(self.layer)
        if pair is None:
            pair = self._heads(self.k(memory)), self._heads(self.v(memory))
            if cache is not None:
                cache.cross_attention[self.layer] = pair
        return self._attend(x, *pair, bias)

    def _attend(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        query = self._heads(self.q(x))
        if key.shape[2] == 0:  # nothing to attend to: the mean over no value is 0
            mixed = torch.zeros_like(query)
        else:
            dropout = self.dropout if self.training else 0.0
            mask = None if bias is None else bias.to(query.dtype)
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0
            )
        merged: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return merged

    def _heads(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        return x.view(batch, length, self.num_heads, self.d_kv).transpose(1, 2)


def key_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An additive mask (B, 1, 1, Lk) from a mask (B, Lk) of real tokens; None stays None.

    Masked keys get the lowest finite number, not -inf: a row without any real key then has a mean
    instead of NaN, and its output concerns nobody.
    """
    if mask is None:
        return None
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    low = zero + torch.finfo(dtype).min
    return torch.where(mask.bool(), zero, low)[:, None, None, :]


def causal_mask(length: int, key_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An additive mask (1, 1, L, Lk): the last L of Lk positions see themselves and what is
    before.
    """
    low = torch.full((length, key_length), torch.finfo(dtype).min, dtype=dtype, device=device)
    return low.triu(key_length - length + 1)[None, None]


def merged_bias(*parts: Tensor | None) -> Tensor | None:
    """The sum of additive biases, clamped to the lowest finite number so that no row is all
    -inf.
    """
    present = [part for part in parts if part is not None]
    if not present:
        return None
    total = present[0]
    for part in present[1:]:
        total = total + part
    return total.clamp(min=torch.finfo(total.dtype).min) if len(present) > 1 else total
