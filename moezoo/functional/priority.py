"""Priority orders other than position, and second chances for pairs that found no place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moezoo.functional.assign import best_experts
from moezoo.functional.queues import occurrences, positions_in_runs, queue_positions, reorder
from moezoo.records import Assignment

_FEW = 16  # so many passes over the scores are cheaper than sorting them


def first_choice_weights(assignment: Assignment) -> Tensor:
    """The highest weight (T,) among each token's kept pairs, without gradient; -1 for none."""
    weight_N = torch.where(assignment.kept, assignment.weight.detach(), -1.0)
    lowest_T = weight_N.new_full((assignment.num_tokens,), -1.0)
    return lowest_T.scatter_reduce(0, assignment.token, weight_N, "amax")


def by_priority(assignment: Assignment, priority_T: Tensor) -> Assignment:
    """The pairs rank by rank, and within a rank by their token's priority, highest first.

    A pair's rank is its place among its token's pairs, in list order. Equal priorities stay in list
    order.
    """
    a = assignment
    order_N = priority_T[a.token].argsort(descending=True, stable=True)
    if a.choices != 1:
        rank_N = positions_in_runs(a.token, a.num_tokens)
        order_N = order_N[rank_N[order_N].argsort(stable=True)]
    return reorder(a, order_N)


def keep_or_move(assignment: Assignment, probs_TE: Tensor, limit: int, hops: int) -> Assignment:
    """First come, first served; an overflowing pair goes on to its token's next best expert.

    Hop by hop, all pairs without a place try the most probable expert that their token has not
    tried yet, behind those who sit there already. A moved pair weighs the probability of its new
    expert; a pair that finds no place stays at its first one, not kept. Equal probabilities: lowest
    expert first.
    """
    a = assignment
    seated_N = a.kept & (queue_positions(a) < limit)
    prefer_TM, others_T = _other_experts(a, probs_TE, hops)
    expert_N, tried_T = a.expert, torch.zeros_like(others_T)
    for _ in range(min(hops, a.num_experts - 1)):
        waiting_N = a.kept & ~seated_N
        turn_N = _turns(a.token, waiting_N, a.num_tokens)
        column_N = tried_T[a.token] + turn_N
        trying_N = waiting_N & (column_N < others_T[a.token])
        target_N = prefer_TM[a.token, column_N.clamp(max=prefer_TM.shape[1] - 1)]
        tried_T = tried_T.index_add(0, a.token, waiting_N.long())
        place_N = _places(a, expert_N, seated_N, target_N, trying_N)
        lucky_N = trying_N & (place_N < limit)
        expert_N = torch.where(lucky_N, target_N, expert_N)
        seated_N = seated_N | lucky_N
    moved_N = expert_N != a.expert
    weight_N = torch.where(moved_N, probs_TE[a.token, expert_N].to(a.weight.dtype), a.weight)
    return replace(a, expert=expert_N, weight=weight_N, kept=seated_N)


def _other_experts(a: Assignment, probs_TE: Tensor, hops: int) -> tuple[Tensor, Tensor]:
    """Per token: the M experts that it may try, by falling probability, those proposed already last
    (T, M); and how many are not proposed (T,).
    """
    proposed_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    proposed_TE = proposed_TE.index_put((a.token, a.expert), torch.ones_like(a.kept))
    score_TE = torch.where(proposed_TE, -1.0, probs_TE.detach())
    most = hops * a.choices
    if 0 < most <= min(a.num_experts, _FEW):
        prefer_TM = best_experts(score_TE, most)
    else:
        prefer_TM = score_TE.sort(dim=-1, descending=True, stable=True).indices
    return prefer_TM, (~proposed_TE).sum(-1)


def _turns(token_N: Tensor, waiting_N: Tensor, num_tokens: int) -> Tensor:
    """Each waiting pair's place among the waiting pairs of its token: 0 for its first."""
    key_N = torch.where(waiting_N, token_N, num_tokens)
    return positions_in_runs(key_N, num_tokens + 1)


def _places(
    a: Assignment, expert_N: Tensor, seated_N: Tensor, target_N: Tensor, trying_N: Tensor
) -> Tensor:
    """The position that each trying pair would get in the queue of its target expert."""
    queues = a.num_groups * a.num_experts
    group_N = (a.token // max(a.group_size, 1)) * a.num_experts
    full_Q = occurrences(torch.where(seated_N, group_N + expert_N, queues), queues + 1)
    key_N = torch.where(trying_N, group_N + target_N, queues)
    return full_Q[key_N] + positions_in_runs(key_N, queues + 1)
