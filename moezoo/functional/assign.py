"""From scores to proposed pairs: every token takes its k best experts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moezoo.errors import RoutingError
from moezoo.ops.eager import is_eager
from moezoo.records import Assignment, Tokens

_MANY_EXPERTS = 256


def best_experts(choice_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the k highest scores of each row, highest first; ties go to the lowest
    index.

    `torch.topk` breaks ties arbitrarily; k passes for the first maximum do not.
    """
    width = _window(choice_TE)
    if width:
        return _best_by_windows(choice_TE.detach(), k, width)
    if k == 1:
        return choice_TE.argmax(dim=-1, keepdim=True)
    remaining_TE = choice_TE.detach().clone()
    columns = []
    for _ in range(k):
        best_T1 = remaining_TE.argmax(dim=-1, keepdim=True)
        columns.append(best_T1)
        remaining_TE.scatter_(1, best_T1, float("-inf"))
    return torch.cat(columns, dim=-1)


def token_choice(
    choice: Tensor, gate: Tensor, k: int, tokens: Tokens, given: Assignment | None = None
) -> Assignment:
    """Give every real token its k experts of highest `choice`, weighed by `gate`.

    Args:
        choice: (T, E), finite; decides who is chosen, needs no gradient.
        gate: (T, E), >= 0; weighs the output and carries the gradient.
        k: experts per token, 1 <= k <= E.
        given: pairs that were chosen elsewhere, to be weighed.

    Returns:
        T * k pairs in rank-major order: all first choices in token order, then all second ones.
    """
    expert_TK = best_experts(choice, k) if given is None else given_experts(given, k)
    return pairs_of(expert_TK, gate.gather(1, expert_TK), choice.shape[1], tokens, given)


def pairs_of(
    expert_TK: Tensor,
    weight_TK: Tensor,
    num_experts: int,
    tokens: Tokens,
    given: Assignment | None = None,
) -> Assignment:
    """The rank-major assignment of chosen experts (T, K) and weights (T, K); padding is not
    kept. given: the pairs that the experts are of, where they were chosen elsewhere.
    """
    if given is not None:
        return weighed(given, weight_TK.t().reshape(-1))
    num_tokens, k = expert_TK.shape
    token_N = torch.arange(num_tokens, device=expert_TK.device)
    token_N = token_N.repeat(k) if k > 1 else token_N
    weight_N = weight_TK.t().reshape(-1)
    if tokens.real is None:
        kept_N = torch.ones_like(token_N, dtype=torch.bool)
    else:
        kept_N = tokens.real.repeat(k)
        # A padding row may hold anything, NaN included; `where` keeps it out of weights and
        # gradients.
        weight_N = torch.where(kept_N, weight_N, weight_N.new_zeros(()))
    return Assignment(
        token=token_N,
        expert=expert_TK.t().reshape(-1),
        weight=weight_N,
        kept=kept_N,
        num_tokens=num_tokens,
        num_experts=num_experts,
        group_size=tokens.group_size,
        choices=k,
        rank_major=True,
    )


def given_experts(given: Assignment, k: int) -> Tensor:
    """The experts (T, K) of pairs that were chosen elsewhere. Raises RoutingError unless they are k
    of every token in rank-major order, as `pairs_of` gives them.
    """
    if given.choices != k or not given.rank_major:
        wanted = f"{k} pairs of every token, all first choices before all second ones"
        found = f"{given.choices or 'a varying number of'} pairs, "
        found += "in that order" if given.rank_major else "in another order"
        raise RoutingError("the given pairs are not of this router", expected=wanted, found=found)
    return given.expert.view(k, given.num_tokens).t()


def weighed(given: Assignment, weight_N: Tensor) -> Assignment:
    """Pairs that were chosen elsewhere with these weights (N,); what is not kept weighs 0."""
    weight_N = torch.where(given.kept, weight_N, weight_N.new_zeros(()))
    return replace(given, weight=weight_N)


def _window(choice_TE: Tensor) -> int:
    """Into windows of how many scores a row falls, all equal; 0: not worth it, or not possible."""
    num_tokens, num_experts = choice_TE.shape
    if not choice_TE.is_cpu or not is_eager() or not choice_TE.is_contiguous():
        return 0
    if num_experts < _MANY_EXPERTS or not num_tokens:
        return 0
    return next((width for width in range(64, 31, -1) if num_experts % width == 0), 0)


def _best_by_windows(choice_TE: Tensor, k: int, width: int) -> Tensor:
    """`best_experts` on a CPU, where a maximum with its index takes six times as long as one
    without: the best window of each row first, then the best score in that window alone.
    """
    num_tokens, num_experts = choice_TE.shape
    windows = choice_TE.view(-1, width)
    most_TW = choice_TE.view(num_tokens, -1, width).amax(-1)
    first_T = torch.arange(num_tokens, device=choice_TE.device) * (num_experts // width)
    expert_TK = first_T.new_empty(num_tokens, k)
    for choice in range(k):
        window_T = most_TW.max(-1).indices  # the first with the maximum has the first maximum
        score_TV = windows.index_select(0, first_T + window_T)
        start_T1 = window_T[:, None] * width
        if choice:
            score_TV = _without(score_TV, expert_TK[:, :choice] - start_T1)
        inside_T1 = score_TV.max(-1, keepdim=True).indices
        expert_TK[:, choice] = (start_T1 + inside_T1)[:, 0]
        if choice + 1 < k:
            rest_T = score_TV.scatter_(1, inside_T1, float("-inf")).amax(-1)
            most_TW.scatter_(1, window_T[:, None], rest_T[:, None])
    return expert_TK


def _without(score_TV: Tensor, place_TK: Tensor) -> Tensor:
    """Scores (T, V) with -infinity at the places that lie in them."""
    width = score_TV.shape[1]
    outside = (place_TK < 0) | (place_TK >= width)
    longer = torch.nn.functional.pad(score_TV, (0, 1))  # the last place takes what lies outside
    return longer.scatter_(1, place_TK.masked_fill(outside, width), float("-inf"))[:, :width]
