"""The router z-loss of ST-MoE."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.losses import mean_over_ranks, z_loss
from moezoo.losses.base import RouterLoss, registry
from moezoo.records import Assignment, Routing


@registry.register("z")
class ZLoss(RouterLoss):
    """Mean over real tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        scope: over which tokens. "batch": those of the call; "global": those of all ranks. There
            every rank must call it while gradients are recorded, and gradients must be averaged
            over ranks, as DDP does.
    """

    needs = frozenset({"logits"})

    def __init__(self, *, scope: Literal["batch", "global"] = "batch") -> None:
        super().__init__()
        if scope not in ("batch", "global"):
            wanted = "'batch' or 'global'"
            raise ConfigError("unknown scope", field="scope", expected=wanted, found=repr(scope))
        self.scope = scope

    def forward(self, routing: Routing) -> Tensor:
        if routing.logits is None:  # a router that does not hold them sums it up itself
            mean = routing.losses["z"]
        else:
            mean = z_loss(routing.logits, routing.real)
        if self.scope == "batch":
            return mean
        offered = routing.offered
        assert isinstance(offered, Assignment)
        return mean_over_ranks(mean, routing.real, offered.num_tokens)

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}"
