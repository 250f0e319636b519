"""One layer's part of a report: who was chosen, how surely, for which tokens, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moezoo.functional.queues import positions_in_runs
from moezoo.functional.statistics import layer_stats
from moezoo.records import Routing, SoftAssignment
from moezoo.reporting.packing import packed, packed_bits
from moezoo.reporting.pairs import Pairs
from moezoo.reporting.replays import NEVER, Replay

TOP_TOKENS = 8  # of each expert
BINS = 10  # of an expert's confidence
FLOWS = 2000  # the largest between two layers


def layer_document(
    name: str, label: str, calls: Sequence[Routing], pairs: Pairs, shown: int, replay: Replay | None
) -> dict[str, Any]:
    """All of a layer but its tokens' words.

    Args:
        shown: tokens of the excerpt.
    """
    stats = layer_stats(calls)
    soft = isinstance(calls[0].assignment, SoftAssignment)
    choices = pairs.choices
    load = pairs.expert.bincount(minlength=pairs.num_experts).tolist() if soft else stats.load
    bins_NB = pairs.expert * BINS + (pairs.share * BINS).long().clamp(max=BINS - 1)
    share_N = (pairs.share * 255).round().long()
    return {
        "name": name,
        "label": label,
        "kind": "soft" if soft else "sparse",
        "experts": pairs.num_experts,
        "choices": choices,
        "confidence_is": "weight" if calls[0].probs is None and not soft else "probability",
        "tokens": stats.tokens,
        "offered": sum(load),
        "dropped": rounded(stats.dropped),
        "max_violation": None if soft else rounded(stats.max_violation),
        "entropy": rounded(stats.entropy),
        "mean_confidence": rounded(stats.confidence),
        "load": load,
        "dead": [] if soft else stats.dead,
        "expert": packed(pairs.by_token(pairs.expert, shown, choices, missing=-1), none=True),
        "share": packed(pairs.by_token(share_N, shown, choices, missing=0)),
        "kept": packed_bits(pairs.by_token(pairs.kept, shown, choices, missing=True)),
        "confidence_bins": packed(bins_NB.bincount(minlength=pairs.num_experts * BINS)),
        "capacity": None if replay is None else _capacity(pairs, shown, replay),
    }


def _capacity(pairs: Pairs, shown: int, replay: Replay) -> dict[str, Any]:
    about = {"policy": replay.policy, "dropped": replay.dropped, "slots": replay.slots}
    if replay.rank is None:
        return {**about, "rank": None}
    # Pairs beyond the excerpt have no rank, and are not shown.
    inside_N = pairs.place < replay.rank.numel()
    rank_N = torch.full_like(pairs.place, NEVER)
    rank_N[inside_N] = replay.rank[pairs.place[inside_N]]
    table = pairs.by_token(rank_N, shown, pairs.choices, missing=NEVER)
    return {**about, "rank": packed(table)}


def top_tokens(pairs: Pairs, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """For every expert the ids (E, TOP_TOKENS) that it gets most beyond chance, and how often each
    (-1 and 0 where there are fewer).

    Ranked by count * log(lift), a token's part in what its id tells of the expert, so that one that
    was seen once does not lead; lift is its share among the expert's tokens over its share in the
    text.
    """
    wide = (pairs.num_experts, TOP_TOKENS)
    id_EM, count_EM = pairs.token.new_full(wide, -1), pairs.token.new_zeros(wide)
    if ids is None or not pairs.token.numel():
        return id_EM, count_EM
    known, row_T, seen_V = torch.unique(ids, return_inverse=True, return_counts=True)
    key_N, count_N = torch.unique(
        pairs.expert * len(known) + row_T[pairs.token], return_counts=True
    )
    expert_N, row_N = key_N // len(known), key_N % len(known)
    load_E = pairs.expert.bincount(minlength=pairs.num_experts)
    chance_N = load_E[expert_N].double() * seen_V[row_N] / len(ids)
    gain_N = count_N * (count_N / chance_N).log()
    order = gain_N.argsort(descending=True, stable=True)
    order = order[expert_N[order].argsort(stable=True)]
    slot_N = positions_in_runs(expert_N[order], pairs.num_experts)
    best = order[(slot_N < TOP_TOKENS) & (gain_N[order] > 0)]
    slot_N = positions_in_runs(expert_N[best], pairs.num_experts)
    id_EM[expert_N[best], slot_N] = known[row_N[best]]
    count_EM[expert_N[best], slot_N] = count_N[best]
    return id_EM, count_EM


def flow(here: Pairs, there: Pairs) -> dict[str, Any]:
    """How many tokens go from each expert of a layer to each of the next one that reads the same
    text, by first choices; the largest `FLOWS`, and how many tokens there are in all.
    """
    ones, others = (_first_choice(pairs) for pairs in (here, there))
    both_T = (ones >= 0) & (others >= 0)
    key_N, count_N = torch.unique((ones * there.num_experts + others)[both_T], return_counts=True)
    largest = count_N.argsort(descending=True, stable=True)[:FLOWS]
    key_N, count_N = key_N[largest], count_N[largest]
    return {
        "from": packed(key_N // there.num_experts),
        "into": packed(key_N % there.num_experts),
        "count": packed(count_N),
        "total": int(both_T.sum()),
    }


def _first_choice(pairs: Pairs) -> Tensor:
    """The expert (T,) with the largest share; -1 for a token without one."""
    return pairs.by_token(pairs.expert, pairs.num_tokens, 1, missing=-1)[:, 0]


def rounded(value: float, digits: int = 5) -> float | None:
    """To so many significant digits; None for NaN and infinities, which JSON has not."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
