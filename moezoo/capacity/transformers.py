"""The policy of Hugging Face transformers' Switch (>= 5.18), quirks included, for parity."""

from __future__ import annotations

from dataclasses import replace

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.limits import Limit
from moezoo.functional.queues import queue_positions
from moezoo.records import Assignment, Routing


@registry.register("transformers")
class TransformersCapacity(CapacityPolicy):
    """Keep the first `limit` tokens of every expert and sequence, counting padding.

    An absolute number, in training and evaluation alike, counted per sequence: `limit`, or else the
    model's own `expert_capacity` (64 where nothing says otherwise). Padding takes slots there; here
    too, but is never computed. Known consequence: cached decoding differs from the whole sequence
    when the limit binds.
    """

    counts_padding = True
    causal_for_many = False  # pairs of several choices come rank by rank
    required_group = "sequence"
    keeps_one = True

    def __init__(self, *, limit: int | None = None, expert_capacity: int = 64) -> None:
        super().__init__()
        self._limit = Limit(limit=expert_capacity if limit is None else limit)

    def limit(self, routing: Routing) -> int:
        return self._limit.slots(routing, training=self.training)

    def forward(self, routing: Routing) -> Assignment:
        assignment = routing.assignment
        assert isinstance(assignment, Assignment)
        position_N = queue_positions(assignment, everyone=True)
        return replace(assignment, kept=assignment.kept & (position_N < self.limit(routing)))

    def extra_repr(self) -> str:
        return repr(self._limit)
