"""No limit: every real pair is kept."""

from __future__ import annotations

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.switch import SwitchCapacity
from moezoo.records import Assignment, Routing


@registry.register("dropless")
class Dropless(CapacityPolicy):
    """Keep every pair that the router proposed (MegaBlocks, arXiv 2211.15841)."""

    may_drop = False
    keeps_one = True

    def limit(self, routing: Routing) -> int | None:
        return None

    def with_factor(self, factor: float) -> CapacityPolicy | None:
        """The paper's policy, as a model without a limit has no other."""
        return SwitchCapacity().with_factor(factor)

    def forward(self, routing: Routing) -> Assignment:
        assert isinstance(routing.assignment, Assignment)
        return routing.assignment
