"""Keys and values of a decoder that generates token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class DecoderCache:
    """Per decoder layer: self-attention keys and values so far, and those of the encoder's output.

    Buffers double when full, so that a token costs amortised constant copying. `length` counts
    tokens whose keys every layer holds. The one mutable record of the package: a cache that copied
    itself at every token would be quadratic.
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
        if buffers is None or buffers[0].shape[2] < end:
            buffers = (
                _grown(buffers, key, self.length, end),
                _grown(buffers, value, self.length, end, 1),
            )
            self.self_attention[layer] = buffers
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count tokens once all layers have appended them."""
        self.length += tokens

    def reorder(self, rows: Tensor) -> None:
        """Keep the given batch rows, in that order (beam search)."""
        for layers in (self.self_attention, self.cross_attention):
            for layer, (key, value) in layers.items():
                layers[layer] = (key.index_select(0, rows), value.index_select(0, rows))


def _grown(
    buffers: tuple[Tensor, Tensor] | None, like: Tensor, length: int, end: int, which: int = 0
) -> Tensor:
    batch, heads, _, width = like.shape
    grown = like.new_zeros(batch, heads, max(2 * length, end, 16), width)
    if buffers is not None:
        grown[:, :, :length] = buffers[which][:, :, :length]
    return grown
