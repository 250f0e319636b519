"""What one routing did, in numbers: drops, load, balance, entropy, confidence, dead experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.records import Assignment, Routing, SoftAssignment


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one sparse layer over real tokens; nothing of padding enters any of them.

    tokens: real tokens seen. offered: pairs that the router proposed. dropped: the share of those
    that were not computed (0 for none offered). load: (E,) offered pairs per expert. computed: (E,)
    kept pairs per expert. max_violation: max load / mean load - 1 (MaxVio, arXiv 2408.15664).
    entropy: mean entropy of the router's probabilities, in nats (NaN without probabilities).
    confidence: mean highest probability (NaN without). dead: experts without a computed pair.
    """

    tokens: int
    offered: int
    dropped: float
    load: list[int]
    computed: list[int]
    max_violation: float
    entropy: float
    confidence: float
    dead: list[int]


def layer_stats(routings: list[Routing]) -> LayerStats:
    """The statistics of a layer over several calls. Synchronises with the device."""
    tokens, load, computed, entropy, confidence = 0, None, None, 0.0, 0.0
    seen_probs = 0
    for routing in routings:
        offered_E, computed_E = (_counts(a) for a in (routing.offered, routing.assignment))
        load = offered_E if load is None else load + offered_E
        computed = computed_E if computed is None else computed + computed_E
        tokens += _num_real(routing)
        if routing.probs is not None:
            chosen = slice(None) if routing.real is None else routing.real
            p_TE = routing.probs.detach()[chosen].float()
            entropy += float(torch.special.entr(p_TE).sum())
            confidence += float(p_TE.amax(-1).sum()) if p_TE.numel() else 0.0
            seen_probs += p_TE.shape[0]
    if load is None or computed is None:
        raise ValueError("layer_stats needs at least one routing")
    total = float(load.sum())
    mean = total / load.numel()
    return LayerStats(
        tokens=tokens,
        offered=int(total),
        dropped=1.0 - float(computed.sum()) / total if total else 0.0,
        load=[int(n) for n in load],
        computed=[int(n) for n in computed],
        max_violation=float(load.max()) / mean - 1.0 if mean else 0.0,
        entropy=entropy / seen_probs if seen_probs else float("nan"),
        confidence=confidence / seen_probs if seen_probs else float("nan"),
        dead=[e for e, n in enumerate(computed.tolist()) if n == 0],
    )


def _counts(assignment: Assignment | SoftAssignment) -> Tensor:
    """Kept pairs per expert (E,); every soft expert is fed by every group."""
    if isinstance(assignment, SoftAssignment):
        groups, _, experts, slots = assignment.dispatch.shape
        return torch.full((experts,), groups * slots, device="cpu")
    kept = assignment.kept.to(torch.int64)
    count_E = torch.zeros(assignment.num_experts, dtype=torch.int64, device=kept.device)
    return count_E.index_add_(0, assignment.expert, kept).cpu()


def _num_real(routing: Routing) -> int:
    if routing.real is not None:
        return int(routing.real.sum())
    if isinstance(routing.assignment, SoftAssignment):
        return routing.assignment.dispatch.shape[0] * routing.assignment.dispatch.shape[1]
    return routing.assignment.num_tokens
