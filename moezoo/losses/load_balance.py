"""The auxiliary loss of Switch Transformers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moezoo.errors import ConfigError, RoutingError
from moezoo.functional.losses import global_load_balance, load_balance
from moezoo.losses.base import RouterLoss, registry
from moezoo.records import Assignment, Routing

_SCOPES = ("sequence", "group", "batch", "global")


@registry.register("load_balance")
class LoadBalanceLoss(RouterLoss):
    """E * sum_e f_e P_e (Switch Transformers, eq. 4-6); k at uniform routing, per layer, unpooled.

    f is the share of tokens offered to expert e, before any capacity policy, P its mean
    probability.

    Args:
        scope: what f and P are taken over. "batch": all tokens of the call; "group": each capacity
            group, "sequence": each sequence as the layer was given them, both averaged over those
            that hold real tokens; "global": the batches of all ranks together (2501.11873). There
            every rank must call it, and gradients must be averaged over ranks, as DDP does.
    """

    needs = frozenset({"probs", "assignment"})

    def __init__(self, *, scope: Literal["sequence", "group", "batch", "global"] = "batch") -> None:
        super().__init__()
        if scope not in _SCOPES:
            wanted = " or ".join(repr(word) for word in _SCOPES)
            raise ConfigError("unknown scope", field="scope", expected=wanted, found=repr(scope))
        self.scope = scope

    def forward(self, routing: Routing) -> Tensor:
        offered, probs = routing.offered, routing.probs
        assert isinstance(offered, Assignment)
        if probs is None:
            return _own(routing, self.scope)
        if self.scope == "global":
            return global_load_balance(probs, offered, routing.real)
        if self.scope == "sequence":
            length = _length(offered, routing.sequence_length)
            return load_balance(probs, offered, routing.real, group_size=length)
        size = offered.group_size if self.scope == "group" else None
        return load_balance(probs, offered, routing.real, group_size=size)

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}"


def _length(offered: Assignment, length: int) -> int:
    if length == 0 and offered.num_tokens:
        hint = "Route through MoE, or give Routing a sequence_length."
        raise RoutingError("scope='sequence' needs to know the sequence length", hint=hint)
    return length


def _own(routing: Routing, scope: str) -> Tensor:
    """The loss as a router without probabilities summed it up itself."""
    if scope != "batch":
        hint = "Use scope='batch', or the router 'switch'."
        raise RoutingError(f"scope={scope!r} needs probabilities, not held here", hint=hint)
    return routing.losses["load_balance"]
