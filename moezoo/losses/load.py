"""The load loss of noisy top-k gating."""

from __future__ import annotations

from torch import Tensor

from moezoo.losses.base import RouterLoss, registry
from moezoo.records import Routing


@registry.register("load")
class LoadLoss(RouterLoss):
    """CV^2 of the smooth expected load per expert (Shazeer et al., 1701.06538, eq. 8-11).

    Only a router with noise knows it: `noisy_top_k` computes it in `Routing.losses`.
    """

    needs = frozenset({"losses.load"})

    def forward(self, routing: Routing) -> Tensor:
        return routing.losses["load"]
