"""What routers did in a step or an evaluation: sums layer by layer, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.functional.collective import num_ranks, summed_over_ranks
from moezoo.functional.statistics import read_stats, sum_of
from moezoo.layer import MoE
from moezoo.records import Assignment, Routing
from moezoo.routers.base import Router


class Seen:
    """What routings add up to, layer by layer. The routings themselves, of the size of all tokens,
    are kept for the routers that adapt to them and for no others.

    Args:
        to_adapt: the model whose routers will adapt to what is seen; None: none will.
    """

    def __init__(self, to_adapt: nn.Module | None = None) -> None:
        modules = () if to_adapt is None else to_adapt.modules()
        routers = [module.router for module in modules if isinstance(module, MoE)]
        self._adaptive = {i: router for i, router in enumerate(routers) if _adapts(router)}
        self._kept: dict[int, list[Routing]] = {index: [] for index in self._adaptive}
        self.sums: list[Tensor] = []
        self.soft: list[bool] = []

    def add(self, routings: Sequence[Routing]) -> None:
        """The routings of all sparse layers of one batch."""
        sums = [sum_of([routing]) for routing in routings]
        before = self.sums or [torch.zeros_like(each) for each in sums]
        self.sums = [a + b for a, b in zip(before, sums, strict=True)]
        self.soft = [not isinstance(routing.assignment, Assignment) for routing in routings]
        for index, kept in self._kept.items():
            kept.append(routings[index])

    def of_all_ranks(self) -> Seen:
        """What the same layers saw on every rank."""
        if num_ranks() == 1 or not self.sums:
            return self
        together = Seen()
        sums = summed_over_ranks(torch.cat(self.sums))
        together.sums = list(torch.split(sums, [each.numel() for each in self.sums]))
        together.soft = self.soft
        return together

    def adapt(self) -> None:
        """Let routers adapt what no gradient trains (balancing biases, thresholds, sparsity) to
        their layer's routings.
        """
        for index, router in self._adaptive.items():
            router.adapt(self._kept[index])


def _adapts(router: Router) -> bool:
    return type(router).adapt is not Router.adapt or "adapt" in vars(router)


def summary(seen: Seen) -> dict[str, Any]:
    """Drops, balance and entropy over sparse layers that choose; empty without them."""
    layers = zip(read_stats(seen.sums), seen.soft, strict=True)
    stats = {index: layer for index, (layer, soft) in enumerate(layers) if not soft}
    if not stats:
        return {}
    offered = sum(s.offered for s in stats.values())
    entropies = [s.entropy for s in stats.values() if not math.isnan(s.entropy)]
    idle = tuple((index, expert) for index, s in stats.items() for expert in s.dead)
    return {
        "dropped": sum(s.dropped * s.offered for s in stats.values()) / max(offered, 1),
        "max_violation": max(s.max_violation for s in stats.values()),
        "entropy": sum(entropies) / len(entropies) if entropies else math.nan,
        "dead": len(idle),
        "idle": idle,
    }
