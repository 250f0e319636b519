"""Dropout as a module."""

from __future__ import annotations

from torch import Tensor, nn

from moezoo.functional.dropout import dropout


class Dropout(nn.Dropout):
    """`nn.Dropout` with the cheap mask of `moezoo.functional.dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)
