"""The auxiliary loss of Switch Transformers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.losses import load_balance
from moezoo.losses.base import RouterLoss, registry
from moezoo.records import Assignment, Routing


@registry.register("load_balance")
class LoadBalanceLoss(RouterLoss):
    """E * sum_e f_e P_e (Switch Transformers, eq. 4-6); k at uniform routing, per layer, unpooled.

    Args:
        scope: what f and P are averaged over: the whole "batch", or each capacity "group" (equal to
            each sequence when the layer groups by sequence) with the mean over groups.
    """

    needs = frozenset({"probs", "assignment"})

    def __init__(self, *, scope: Literal["batch", "group"] = "batch") -> None:
        super().__init__()
        if scope not in ("batch", "group"):
            raise ConfigError(
                "unknown scope", field="scope", expected="'batch' or 'group'", found=scope
            )
        self.scope = scope

    def forward(self, routing: Routing) -> Tensor:
        offered = routing.offered
        assert isinstance(offered, Assignment)
        assert routing.probs is not None
        size = offered.group_size if self.scope == "group" else None
        return load_balance(routing.probs, offered, routing.real, group_size=size)
