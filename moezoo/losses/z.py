"""The router z-loss of ST-MoE."""

from __future__ import annotations

from torch import Tensor

from moezoo.functional.losses import z_loss
from moezoo.losses.base import RouterLoss, registry
from moezoo.records import Routing


@registry.register("z")
class ZLoss(RouterLoss):
    """Mean over real tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""

    needs = frozenset({"logits"})

    def forward(self, routing: Routing) -> Tensor:
        if routing.logits is None:  # a router that does not hold them sums it up itself
            return routing.losses["z"]
        return z_loss(routing.logits, routing.real)
