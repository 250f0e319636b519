"""The linear map of the models as a module: no bias; and an embedding as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.functional.drawn import FanIn
from moezoo.ops.linear import linear
from moezoo.ops.products import Prepared


class Linear(nn.Linear):
    """y = x W^T with W (out, in), of standard deviation gain / sqrt(in), times the model's scale
    (`initialize`).
    """

    def __init__(self, in_features: int, out_features: int, *, gain: float = 1.0) -> None:
        self.initial = FanIn(gain=gain)  # the constructor draws
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        self.initial(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def prepared(self, rows: int) -> Prepared:
        """The map for `rows` rows, without a gradient, to be called many times."""
        return Prepared(self.weight, rows)


def table_weight(table: nn.Embedding, device: torch.device | None = None) -> Tensor:
    """The matrix (V, D) of an embedding, for a head that is tied to it.

    It is read: hooks of the embedding see lookups, not the head. Of a wrapper (LoRA) or weights
    that are elsewhere until called for (offload) it is what they make of every id.
    """
    weight: Tensor = table.weight
    if type(table).forward is nn.Embedding.forward and not weight.is_meta:
        return weight
    found: Tensor = table(torch.arange(weight.shape[0], device=device))
    return found
