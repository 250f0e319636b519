"""Queues: the pairs of one (group, expert) in priority order. Time and memory are linear in
pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.records import Assignment


def queue_keys(assignment: Assignment, *, everyone: bool = False) -> Tensor:
    """The queue number (N,) of each pair, group * E + expert; pairs not kept share the last one, G
    * E.

    `everyone=True` gives pairs that are not kept (padding) a place in their queue too.
    """
    a = assignment
    group_N = a.token // max(a.group_size, 1)
    key_N = group_N * a.num_experts + a.expert
    if everyone:
        return key_N
    return torch.where(a.kept, key_N, a.num_groups * a.num_experts)


def queue_positions(assignment: Assignment, *, everyone: bool = False) -> Tensor:
    """The position (N,) int64, from 0, of each kept pair in its queue, in list order.

    A stable sort by queue replaces the (tokens x experts) running sum of the paper's pseudo-code.
    Pairs that are not kept get a position among themselves, which means nothing.
    """
    key_N = queue_keys(assignment, everyone=everyone)
    num_queues = assignment.num_groups * assignment.num_experts + 1
    return positions_in_runs(key_N, num_queues)


def positions_in_runs(key_N: Tensor, num_keys: int) -> Tensor:
    """How many earlier entries of the list share each entry's key; keys lie in [0, num_keys)."""
    sorted_N, order_N = key_N.sort(stable=True)
    count_Q = occurrences(key_N, num_keys)
    start_Q = count_Q.cumsum(0) - count_Q
    place_N = torch.arange(key_N.shape[0], device=key_N.device)
    rank_N = place_N - start_Q.index_select(0, sorted_N)
    return torch.empty_like(rank_N).index_copy_(0, order_N, rank_N)


def occurrences(key_N: Tensor, num_keys: int) -> Tensor:
    """How often every key of [0, num_keys) is in the list, (num_keys,) int64."""
    # Zeros of the keys' own kind: `vmap` adds to nothing else in place.
    return key_N.new_zeros(num_keys).index_add_(0, key_N, torch.ones_like(key_N))


def pairs_per_expert(assignment: Assignment) -> Tensor:
    """How many kept pairs every expert has, (E,) int64, without leaving the device."""
    kept_N = assignment.kept.long()
    count_E = kept_N.new_zeros(assignment.num_experts)
    return count_E.index_add(0, assignment.expert, kept_N)


def reorder(assignment: Assignment, order_N: Tensor) -> Assignment:
    """The same pairs in another priority order: entry i of the result is entry order[i]."""
    a = assignment
    return Assignment(
        token=a.token[order_N],
        expert=a.expert[order_N],
        weight=a.weight[order_N],
        kept=a.kept[order_N],
        num_tokens=a.num_tokens,
        num_experts=a.num_experts,
        group_size=a.group_size,
        choices=a.choices,
    )


def token_major(assignment: Assignment) -> Assignment:
    """Each token's pairs side by side, in list order: an earlier token never waits for a later
    one.
    """
    return reorder(assignment, assignment.token.argsort(stable=True))
