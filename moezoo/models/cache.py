"""Keys and values of a decoder that generates token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moezoo.ops.eager import is_transformed

_FIRST_SIZE = 32


@dataclass
class DecoderCache:
    """Per decoder layer: self-attention keys and values so far, and those of the encoder's output.

    Buffers double when full, so that a token costs amortised constant copying; with a gradient each
    step makes its own. `length` counts tokens whose keys every layer holds. The one mutable record
    of the package: a cache that copied itself at every token would be quadratic.
    """

    length: int = 0
    self_attention: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cross_attention: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H, L, dk) to a layer; return all of its keys and values (B, H, length + L,
        dk).
        """
        end = self.length + key.shape[2]
        buffers = self.self_attention.get(layer)
        wanted = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if wanted or is_transformed():
            # Earlier steps may be asked for their gradients: what they have read stays as it is.
            earlier = buffers or (key[:, :, :0], value[:, :, :0])
            keys = torch.cat([earlier[0][:, :, : self.length], key], 2)
            values = torch.cat([earlier[1][:, :, : self.length], value], 2)
            self.self_attention[layer] = keys, values
            return keys, values
        if buffers is None or buffers[0].shape[2] < end:
            old_keys, old_values = (None, None) if buffers is None else buffers
            buffers = (
                _grown(old_keys, key, self.length, end),
                _grown(old_values, value, self.length, end),
            )
            self.self_attention[layer] = buffers
        keys, values = buffers
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count tokens once all layers have appended them."""
        self.length += tokens

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows of the self-attention, in that order (beam search).

        Cross-attention stays: the beams of a source share the encoder's output.
        """
        for layer, (keys, values) in self.self_attention.items():
            self.self_attention[layer] = (keys.index_select(0, rows), values.index_select(0, rows))


def _grown(buffer: Tensor | None, like: Tensor, length: int, end: int) -> Tensor:
    batch, heads, _, width = like.shape
    grown = like.new_zeros(batch, heads, max(2 * length, end, _FIRST_SIZE), width)
    if buffer is not None:
        grown[:, :, :length] = buffer[:, :, :length]
    return grown
