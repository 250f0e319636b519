"""Position order: the earliest pairs of every queue are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.limits import Limit
from moezoo.errors import ConfigError
from moezoo.functional.queues import queue_positions, token_major
from moezoo.records import Assignment, Routing


@registry.register("first_come")
class FirstCome(CapacityPolicy):
    """Keep a prefix of every (group, expert) queue (Switch Transformers, section 2.2).

    The paper's pseudo-code keeps one token too few (inclusive cumsum with `<`); this keeps `limit`.

    Args:
        factor, eval_factor, limit, rule: see `moezoo.capacity.limits.Limit`.
        order: for k > 1, "rank" serves all first choices, then all second ones (flaxformer,
            GShard); "token" serves tokens one after another, which is causal. Equal for k = 1.
    """

    keeps_one = True  # a limit is at least 1

    def __init__(
        self,
        *,
        factor: float | None = None,
        eval_factor: float | None = None,
        limit: int | None = None,
        rule: str = "switch",
        order: Literal["rank", "token"] = "rank",
    ) -> None:
        super().__init__()
        if order not in ("rank", "token"):
            raise ConfigError(
                "unknown order", field="order", expected="'rank' or 'token'", found=order
            )
        self._limit = Limit(factor, eval_factor, limit, rule)
        self.order = order
        # In rank order a later token's first choice takes the place of an earlier token's second.
        self.causal_for_many = order == "token"

    def limit(self, routing: Routing) -> int | None:
        return self._limit.slots(routing, training=self.training)

    def forward(self, routing: Routing) -> Assignment:
        assignment = routing.assignment
        assert isinstance(assignment, Assignment)
        limit = self.limit(routing)
        if limit is None or limit >= assignment.group_size:
            return assignment  # a token stands once in a queue, so none is longer
        if self.order == "token" and assignment.choices != 1:
            assignment = token_major(assignment)
        return keep_first(assignment, limit)

    def extra_repr(self) -> str:
        return f"{self._limit}, order={self.order!r}"


def keep_first(assignment: Assignment, limit: int | None) -> Assignment:
    """Clear `kept` of every pair whose position in its queue is `limit` or later."""
    if limit is None or limit >= assignment.group_size:
        return assignment  # a token stands once in a queue, so none is longer
    return replace(assignment, kept=assignment.kept & (queue_positions(assignment) < limit))
