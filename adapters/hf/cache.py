"""moezoo's decoder cache with the few methods that transformers' generation calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moezoo.models.cache import DecoderCache


@dataclass
class GenerationCache:
    """Keys and values of a decoder while transformers' `generate` runs it.

    Rows are one per beam, the encoder's output repeated for each, so that a reordering within the
    beams of a source leaves cross-attention as it is.
    """

    inner: DecoderCache = field(default_factory=DecoderCache)
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Target tokens whose keys are cached."""
        return self.inner.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows, in that order."""
        self.inner.reorder(beam_idx)
