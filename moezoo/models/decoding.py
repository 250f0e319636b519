"""What generation needs of a model, so that it need not know the models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from moezoo.config import SwitchConfig
from moezoo.generation_options import StoredGeneration
from moezoo.models.stack import Stack


class Decoding(Protocol):
    """A model with an encoder, token embeddings, a decoder and a head."""

    config: SwitchConfig
    generation: StoredGeneration
    shared: nn.Embedding
    decoder: Stack

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The encoder's output (B, Ls, D) and its real tokens (B, Ls), first."""
