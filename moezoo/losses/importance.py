"""The importance loss of the first sparsely-gated layers."""

from __future__ import annotations

from torch import Tensor

from moezoo.functional.losses import importance
from moezoo.losses.base import RouterLoss, registry
from moezoo.records import Assignment, Routing


@registry.register("importance")
class ImportanceLoss(RouterLoss):
    """CV^2 of the summed weight per expert (Shazeer et al., 1701.06538, eq. 6-7); 0 when equal.

    The weights are the router's own, before any capacity policy; padding has none.
    """

    needs = frozenset({"assignment", "logits"})

    def forward(self, routing: Routing) -> Tensor:
        offered = routing.offered
        assert isinstance(offered, Assignment)
        return importance(offered)
