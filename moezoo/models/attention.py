"""T5 attention: no scaling by sqrt(d), no biases, an additive position bias."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.config import SwitchConfig
from moezoo.functional.attention import attention_with_dropout, composed_attention
from moezoo.functional.dropout import dropout
from moezoo.models.cache import DecoderCache
from moezoo.models.linear import Linear
from moezoo.models.position import Buckets, PositionBias, relative_bias
from moezoo.ops.eager import is_eager, is_transformed


class Attention(nn.Module):
    """Multi-head attention of T5 (arXiv 1910.10683) on `scaled_dot_product_attention`.

    Args:
        config: widths, heads, buckets, dropout.
        decoder: one-sided position buckets.
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
        # Smaller by sqrt(d_kv): T5 does not divide the scores by it.
        self.q = Linear(config.d_model, inner, gain=config.d_kv**-0.5)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)
        self.buckets = Buckets(
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            bidirectional=not decoder,
        )
        number = self.buckets.number
        std = config.initializer_factor * config.d_model**-0.5
        table = PositionBias(number, self.num_heads, std=std) if position_bias else None
        self.position_bias = table

    def forward(self, x: Tensor, bias: Tensor | None, cache: DecoderCache | None = None) -> Tensor:
        """Self-attention: x (B, L, D), bias (1 or B, H or 1, L, Lk) additive or None -> (B, L,
        D).
        """
        key, value = self._heads(self.k(x)), self._heads(self.v(x))
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        mixed = self._attend(self._heads(self.q(x)), key, value, bias)
        y: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return y

    def cross(
        self, x: Tensor, memory: Tensor, bias: Tensor | None, cache: DecoderCache | None = None
    ) -> Tensor:
        """Attention to the encoder's output: x (B, L, D), memory (B, Lm, D) -> (B, L, D).

        A memory of B / n rows serves n rows of x each (beams, samples): they are attended as n * L
        queries of one row, so that keys and values are neither copied nor read n times.
        """
        pair = None if cache is None else cache.cross_attention.get(self.layer)
        if pair is None:
            pair = self.of_memory(memory)
            if cache is not None:
                cache.cross_attention[self.layer] = pair
        rows, length, sources = x.shape[0], x.shape[1], memory.shape[0]
        query = self.q(x)
        if rows != sources:
            query = query.reshape(sources, rows // sources * length, self.num_heads * self.d_kv)
        mixed = self._attend(self._heads(query), *pair, bias)
        y: Tensor = self.o(mixed.transpose(1, 2).reshape(rows, length, self.num_heads * self.d_kv))
        return y

    def relative_bias(
        self, query_length: int, key_length: int, *, offset: int = 0, device: torch.device
    ) -> Tensor | None:
        """(1, H, Lq, Lk), see `relative_bias`; None where another layer has the table."""
        if self.position_bias is None:
            return None
        return relative_bias(
            self.position_bias, self.buckets, query_length, key_length, offset=offset, device=device
        )

    def of_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, Lm, dk) of the encoder's output (B, Lm, D)."""
        return self._heads(self.k(memory)), self._heads(self.v(memory))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k^T + bias) v, (B, H, L, dk)."""
        if key.shape[2] == 0:  # nothing to attend to: the mean over no value is 0
            return torch.zeros_like(query)
        if bias is not None and bias.dtype != query.dtype:
            # Autocast: a narrower type may not hold the lowest float32, and -inf would give NaN.
            bias = bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        rate = self.dropout if self.training else 0.0
        if is_transformed():
            drop = partial(dropout, p=rate, training=self.training)
            return composed_attention(query, key, value, bias, drop)
        if rate and query.device.type == "cpu" and is_eager():
            return attention_with_dropout(query, key, value, bias, p=rate)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=rate, scale=1.0
        )

    def _heads(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        return x.view(batch, length, self.num_heads, self.d_kv).transpose(1, 2)


def key_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An additive mask (B, 1, 1, Lk) from a mask (B, Lk) of real tokens; None stays None.

    Masked keys get the lowest finite number, not -inf: a row without any real key then has a mean
    instead of NaN, and its output is not used.
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


def merged_bias(position: Tensor, mask: Tensor | None) -> Tensor:
    """Position bias plus additive mask, not below the lowest finite number: no row is all -inf."""
    if mask is None:
        return position
    total = position + mask
    return total.clamp_(min=torch.finfo(total.dtype).min)
