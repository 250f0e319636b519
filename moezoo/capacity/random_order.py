"""Random order: every token has the same chance of a place."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.capacity.base import CapacityPolicy, registry
from moezoo.capacity.first_come import keep_first
from moezoo.capacity.limits import Limit
from moezoo.errors import ConfigError
from moezoo.functional.priority import by_priority
from moezoo.records import Assignment, Routing


@registry.register("random_order")
class RandomOrder(CapacityPolicy):
    """Serve tokens in random order (random token selection of DeepSpeed-MoE, arXiv 2201.05596).

    For k > 1 all first choices come before all second ones. Without a seed, training draws from
    torch's generator, so that late positions are dropped no more often than early ones, and
    evaluation goes by position. With a seed both use one permutation per length, drawn from it.

    Args:
        factor, eval_factor, limit, rule: see `moezoo.capacity.limits.Limit`.
        seed: of a fixed permutation; None: a new one for every training step.
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
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self._limit = Limit(factor, eval_factor, limit, rule)
        if seed is not None and (isinstance(seed, bool) or not 0 <= seed < 2**63):
            raise ConfigError("seed is a whole number >= 0", field="seed", found=repr(seed))
        self.seed = seed

    @property
    def waits(self) -> bool:
        return self.seed is not None  # for numbers drawn on the CPU

    def limit(self, routing: Routing) -> int:
        return self._limit.slots(routing, training=self.training)

    def forward(self, routing: Routing) -> Assignment:
        assignment = routing.assignment
        assert isinstance(assignment, Assignment)
        limit = self.limit(routing)
        if limit >= assignment.group_size:
            return assignment  # nobody has to be served before another
        ordered = by_priority(assignment, self._priority(assignment))
        return keep_first(ordered, limit)

    def _priority(self, assignment: Assignment) -> Tensor:
        """A priority (T,) per token: random, or equal for all in evaluation without a seed."""
        count, device = assignment.num_tokens, assignment.token.device
        if self.seed is not None:
            source = torch.Generator("cpu").manual_seed(self.seed)
            return torch.rand(count, generator=source, device="cpu").to(device)
        made = torch.rand if self.training else torch.zeros
        return made(count, device=device)

    def extra_repr(self) -> str:
        return f"{self._limit}, seed={self.seed}"
