"""What any capacity factor would have dropped: the policy itself, run again over the proposals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moezoo.capacity.base import CapacityPolicy
from moezoo.capacity.switch import SwitchCapacity
from moezoo.records import Assignment, Routing
from moezoo.reporting.observation import real_tokens

FACTORS = (
    *(step / 20 for step in range(5, 40)),
    *(step / 4 for step in range(8, 16)),
    *(4.0, 5.0, 6.0, 8.0),
)
NEVER = len(FACTORS)


@dataclass(frozen=True)
class Replay:
    """A layer at every factor of `FACTORS`.

    Fields: policy, the class that was replayed; dropped, pairs by factor; slots, by factor what one
    expert has room for over all calls, None where there is no limit; rank, of the pair at
    `Pairs.place` the index of the first factor that keeps it, `NEVER` for none (None for policies
    that move pairs to other experts).
    """

    policy: str
    dropped: list[int]
    slots: list[int | None]
    rank: Tensor | None


def replayed(
    calls: Sequence[Routing], policy: CapacityPolicy | None, *, tokens: int
) -> Replay | None:
    """The replay of a layer, or None where nothing can be dropped or there is no factor to change:
    soft routing, and policies of others without `with_factor`.

    Args:
        policy: as the layer has it; None: the paper's.
        tokens: how many of the first real tokens need a rank.
    """
    if any(not isinstance(call.offered, Assignment) for call in calls):
        return None
    at = [(policy or SwitchCapacity()).with_factor(factor) for factor in FACTORS]
    if any(changed is None for changed in at):
        return None
    policies = [changed for changed in at if changed is not None]
    if policies[0].moves and any(call.probs is None for call in calls):
        return None
    ranks: list[Tensor] = []
    dropped, slots = [0] * len(FACTORS), [0] * len(FACTORS)
    limited = True
    start = 0
    for call in calls:
        offered = call.offered
        assert isinstance(offered, Assignment)
        wanted = start < tokens and not policies[0].moves
        rank_P = torch.full((offered.num_tokens * offered.num_experts * wanted,), NEVER)
        proposal = replace(call, assignment=offered, proposed=None)
        count, complete = int(offered.kept.sum()), False
        for step, changed in enumerate(policies):
            limit = changed.limit(proposal)
            limited &= limit is not None
            slots[step] += (limit or 0) * offered.num_groups
            if complete:  # more room never drops what was kept
                continue
            admitted = changed(proposal)
            kept = admitted.kept
            if wanted:
                key_N = (admitted.token * offered.num_experts + admitted.expert)[kept]
                rank_P[key_N] = rank_P[key_N].clamp(max=step)
            missing = count - int(kept.sum())
            dropped[step] += missing
            complete = missing == 0
        ranks.append(rank_P)
        start += int(real_tokens(call).sum())
    rank = None if policies[0].moves else torch.cat(ranks)
    return Replay(
        type(policies[0]).__name__, dropped, [n if limited else None for n in slots], rank
    )
