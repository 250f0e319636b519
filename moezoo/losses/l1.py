"""The sparsity loss of ReLU routing."""

from __future__ import annotations

from torch import Tensor

from moezoo.losses.base import RouterLoss, registry
from moezoo.records import Routing


@registry.register("l1")
class L1Loss(RouterLoss):
    """The mean sum of gates per token, times the router's adaptive coefficient (2412.14711, eq. 6).

    `relu` computes it in `Routing.losses`; since it adapts its coefficient itself, give this loss
    the weight 1.
    """

    needs = frozenset({"losses.l1"})

    def forward(self, routing: Routing) -> Tensor:
        return routing.losses["l1"]
