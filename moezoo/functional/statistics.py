"""What one routing did, in numbers: drops, load, balance, entropy, confidence, dead experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from moezoo.functional.queues import pairs_per_expert
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


def layer_stats(routings: Sequence[Routing]) -> LayerStats:
    """The statistics of a layer over several calls. Synchronises with the device."""
    (stats,) = read_stats([sum_of(routings)])
    return stats


def sum_of(routings: Sequence[Routing]) -> Tensor:
    """What a layer's calls add up to (4 + 2 E,), on their device, without waiting for it: sums of
    further calls are added to it, and `read_stats` makes statistics of the whole.
    """
    if not routings:
        raise ValueError("statistics need at least one routing")
    return torch.stack([_sums(routing) for routing in routings]).sum(0)


def read_stats(sums: Sequence[Tensor]) -> list[LayerStats]:
    """The statistics of some layers from their sums, which come from the device in one transfer."""
    if not sums:
        return []
    read = iter(torch.cat(list(sums)).tolist())
    return [_stats(list(islice(read, each.numel()))) for each in sums]


def _stats(sums: Sequence[float]) -> LayerStats:
    tokens, seen, entropy, confidence, *counts = sums
    num_experts = len(counts) // 2
    load, computed = ([int(n) for n in counts[i::2]] for i in (0, 1))
    total = sum(load)
    mean = total / num_experts
    return LayerStats(
        tokens=int(tokens),
        offered=total,
        dropped=1.0 - sum(computed) / total if total else 0.0,
        load=load,
        computed=computed,
        max_violation=max(load) / mean - 1.0 if mean else 0.0,
        entropy=entropy / seen if seen else float("nan"),
        confidence=confidence / seen if seen else float("nan"),
        dead=[e for e, n in enumerate(computed) if n == 0],
    )


@torch.no_grad()
def _sums(routing: Routing) -> Tensor:
    """Real tokens, those with probabilities, entropy, confidence, then load and computed pairs of
    each expert in turn.
    """
    load_E, computed_E = (_counts(a) for a in (routing.offered, routing.assignment))
    # Counts stay exact beyond 2^24; Apple's devices have no float64.
    wide = torch.float32 if load_E.device.type == "mps" else torch.float64
    tokens, probs_TE, real = _num_real(routing), routing.probs, routing.real
    head = [load_E.new_full((), tokens) if isinstance(tokens, int) else tokens]
    if probs_TE is None:
        head += [torch.zeros_like(head[0])] * 3
    else:
        p_TE = probs_TE.detach().float()
        p_TE = p_TE if real is None else torch.where(real[:, None], p_TE, 0.0)
        highest = p_TE.amax(-1) if p_TE.shape[1] else p_TE.new_zeros(len(p_TE))
        head += [head[0], torch.special.entr(p_TE).sum(dtype=wide), highest.sum(dtype=wide)]
    pairs = torch.stack((load_E, computed_E), 1).flatten()
    return torch.cat((torch.stack([value.to(wide) for value in head]), pairs.to(wide)))


def _counts(assignment: Assignment | SoftAssignment) -> Tensor:
    """Kept pairs per expert (E,); every soft expert is fed by every group."""
    if isinstance(assignment, SoftAssignment):
        groups, _, experts, slots = assignment.dispatch.shape
        return torch.full((experts,), groups * slots, device=assignment.dispatch.device)
    return pairs_per_expert(assignment)


def _num_real(routing: Routing) -> int | Tensor:
    if routing.real is not None:
        return routing.real.sum()
    if isinstance(routing.assignment, SoftAssignment):
        return routing.assignment.dispatch.shape[0] * routing.assignment.dispatch.shape[1]
    return routing.assignment.num_tokens
