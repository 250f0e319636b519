"""Rerouting: who finds no place goes to the next best expert."""

from __future__ import annotations

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.limits import Limit
from moezoo.errors import ConfigError
from moezoo.functional.priority import keep_or_move
from moezoo.records import Assignment, Routing


@registry.register("reroute")
class Reroute(CapacityPolicy):
    """No token left behind: overflow goes to the next expert (Switch Transformers, appendix B).

    First come, first served, in list order; then, hop by hop, all pairs without a place try the
    most probable expert that their token has not tried. Everything that `first_come` keeps is kept.
    A moved pair weighs the probability of its new expert. Not causal: a later token's first choice
    is served before an earlier token's second.

    Args:
        factor, eval_factor, limit, rule: see `moezoo.capacity.limits.Limit`.
        hops: how many further experts a pair may try; None: all, so that for k = 1 nothing is
            dropped where the places suffice. Time grows with hops * pairs.
    """

    causal = False
    causal_for_many = False
    moves = True

    def __init__(
        self,
        *,
        factor: float | None = None,
        eval_factor: float | None = None,
        limit: int | None = None,
        rule: str = "switch",
        hops: int | None = None,
    ) -> None:
        super().__init__()
        self._limit = Limit(factor, eval_factor, limit, rule)
        if hops is not None and (isinstance(hops, bool) or hops < 1):
            raise ConfigError("hops is a whole number >= 1", field="hops", found=repr(hops))
        self.hops = hops

    def limit(self, routing: Routing) -> int:
        return self._limit.slots(routing, training=self.training)

    def forward(self, routing: Routing) -> Assignment:
        assignment = routing.assignment
        assert isinstance(assignment, Assignment)
        assert routing.probs is not None  # the layer refuses routers without probabilities
        limit = self.limit(routing)
        if limit >= assignment.group_size:
            return assignment  # a token stands once in a queue, so none is longer
        hops = assignment.num_experts - 1 if self.hops is None else self.hops
        return keep_or_move(assignment, routing.probs, limit, hops)

    def extra_repr(self) -> str:
        return f"{self._limit}, hops={self.hops}"
