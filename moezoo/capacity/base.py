"""What every capacity policy is: it admits proposed pairs up to a limit per (group, expert)."""

from __future__ import annotations

import copy

from moezoo.capacity.limits import Limit
from moezoo.component import Component
from moezoo.records import Assignment, Routing
from moezoo.registry import Registry


class CapacityPolicy(Component):
    """Turns a proposed routing into the admitted assignment.

    A policy may clear `kept`, reorder pairs, or move a pair that it cleared itself (reroute);
    nothing else. It is a module without parameters so that `train()` and `eval()` reach it.

    Class or instance attributes:
        causal: which pairs of a token are kept depends on earlier tokens only, for one choice per
            token.
        causal_for_many: the same for several choices per token.
        counts_padding: padding takes capacity (only for parity with libraries that do so).
        may_drop: some real pair can be dropped.
        moves: a pair may come back with another expert (reroute).
        keeps_one: the one pair of a token that is alone in its group is kept, as it is. Not
            inherited: a class that says so says it in its own body.
        required_group: the only grouping under which the policy means anything, or None.
    """

    causal: bool = True
    causal_for_many: bool = True
    counts_padding: bool = False
    may_drop: bool = True
    moves: bool = False
    keeps_one: bool = False
    required_group: str | None = None
    _limit: Limit  # of policies that have one

    @property
    def waits(self) -> bool:
        """Whether `forward`, in the current mode, makes the host wait for a GPU: no CUDA graph can
        hold it then.
        """
        return False

    def limit(self, routing: Routing) -> int | None:
        """Slots per (group, expert) for this routing in the current mode; None: no limit."""
        raise NotImplementedError

    def with_factor(self, factor: float) -> CapacityPolicy | None:
        """The same policy with another capacity factor, in evaluation, to be asked what it would
        have dropped; None for a policy that has no `Limit`.
        """
        own = getattr(self, "_limit", None)
        if not isinstance(own, Limit):
            return None
        changed = copy.deepcopy(self).eval()
        changed._limit = Limit(factor, rule="switch" if own.absolute is not None else own.rule)
        return changed

    def forward(self, routing: Routing) -> Assignment:
        """Admit pairs of `routing.assignment`."""
        raise NotImplementedError


registry: Registry[CapacityPolicy] = Registry("capacity policy", CapacityPolicy, "moezoo.capacity")
