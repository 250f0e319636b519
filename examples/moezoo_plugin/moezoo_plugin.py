"""A plugin: once installed, `capacity="every_other"` works everywhere, and nothing here is imported
before it is asked for.
"""

from dataclasses import replace

from moezoo.capacity import CapacityPolicy
from moezoo.functional.queues import queue_positions
from moezoo.records import Assignment, Routing


class EveryOther(CapacityPolicy):
    """Keep every other pair of each queue: half of the work, spread over the sequence."""

    def limit(self, routing: Routing) -> int | None:
        return None

    def forward(self, routing: Routing) -> Assignment:
        offered = routing.assignment
        return replace(offered, kept=offered.kept & (queue_positions(offered) % 2 == 0))
