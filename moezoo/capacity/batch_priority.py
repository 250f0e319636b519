"""Batch priority: the tokens that their router is surest about are served first."""

from __future__ import annotations

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.first_come import keep_first
from moezoo.capacity.limits import Limit
from moezoo.functional.priority import by_priority, first_choice_weights
from moezoo.records import Assignment, Routing


@registry.register("batch_priority")
class BatchPriority(CapacityPolicy):
    """Serve tokens by the weight of their first choice, highest first (V-MoE, 2106.05974, 4.1).

    For k > 1 all first choices come before all second ones, in the same order of tokens (as
    flaxformer does). Equal weights stay in position order. Not causal: a later, surer token takes
    an earlier one's place.

    Args:
        factor, eval_factor, limit, rule: see `moezoo.capacity.limits.Limit`.
    """

    causal = False
    causal_for_many = False

    def __init__(
        self,
        *,
        factor: float | None = None,
        eval_factor: float | None = None,
        limit: int | None = None,
        rule: str = "switch",
    ) -> None:
        super().__init__()
        self._limit = Limit(factor, eval_factor, limit, rule)

    def limit(self, routing: Routing) -> int:
        return self._limit.slots(routing, training=self.training)

    def forward(self, routing: Routing) -> Assignment:
        assignment = routing.assignment
        assert isinstance(assignment, Assignment)
        limit = self.limit(routing)
        if limit >= assignment.group_size:
            return assignment  # nobody has to be served before another
        ordered = by_priority(assignment, first_choice_weights(assignment))
        return keep_first(ordered, limit)

    def extra_repr(self) -> str:
        return repr(self._limit)
