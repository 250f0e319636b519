"""Caches of transformers as a moezoo decoder reads and extends them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from moezoo.errors import ConfigError
from moezoo.models.cache import DecoderCache


class BorrowedCache(DecoderCache):
    """A DecoderCache whose keys and values are in a cache of transformers: dynamic, static, or any
    that has `update`.
    """

    def __init__(self, theirs: EncoderDecoderCache) -> None:
        super().__init__(length=int(theirs.get_seq_length()))
        self.theirs: Any = theirs
        self.cross_attention = _CrossAttention(theirs)  # type: ignore[assignment]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, L, dk) to a layer; return its keys and values (B, H, length + L, dk). A
        static cache returns its whole buffer, of which the rest is not there yet.
        """
        end = self.length + key.shape[2]
        keys, values = self.theirs.self_attention_cache.update(key, value, layer)
        return keys[:, :, :end], values[:, :, :end]


class _CrossAttention:
    """Keys and values of the encoder's output by layer."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def get(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if not self.theirs.is_updated.get(layer):
            return None
        found = self.theirs.cross_attention_cache.layers[layer]
        return found.keys, found.values

    def __setitem__(self, layer: int, pair: tuple[Tensor, Tensor]) -> None:
        self.theirs.cross_attention_cache.update(*pair, layer)
        self.theirs.is_updated[layer] = True


def new_cache() -> EncoderDecoderCache:
    """An empty cache that grows."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def borrowed(past_key_values: Any) -> DecoderCache | None:
    """What the decoder takes for a cache of transformers, of moezoo, or none."""
    if past_key_values is None or isinstance(past_key_values, DecoderCache):
        return past_key_values
    if not isinstance(past_key_values, EncoderDecoderCache):
        past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
    return BorrowedCache(past_key_values)


def cache_of(past_key_values: Any, cache: Any) -> Any:
    """A cache by its name in transformers before 5.24, or by that since. Raises ConfigError for
    both.
    """
    if past_key_values is not None and cache is not None:
        hint = "Pass one of them: they are two names of one argument."
        raise ConfigError("cache and past_key_values are both given", field="cache", hint=hint)
    return cache if past_key_values is None else past_key_values
