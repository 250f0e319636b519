"""A table of vectors that says how wide it is drawn."""

from __future__ import annotations

from torch import nn

from moezoo.functional.drawn import normal_


class Embedding(nn.Embedding):
    """A table (rows, width) drawn from N(0, std^2)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float = 1.0) -> None:
        self.std = std  # the constructor draws
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        normal_(self.weight, std=self.std)
