"""From scores to proposed pairs: every token takes its k best experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.records import Assignment, Tokens


def best_experts(choice_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the k highest scores of each row, highest first; ties go to the lowest
    index.

    `torch.topk` breaks ties arbitrarily; k passes of `argmax`, which takes the first maximum, do
    not.
    """
    if k == 1:
        return choice_TE.argmax(dim=-1, keepdim=True)
    remaining_TE = choice_TE.detach().clone()
    columns = []
    for _ in range(k):
        best_T1 = remaining_TE.argmax(dim=-1, keepdim=True)
        columns.append(best_T1)
        remaining_TE.scatter_(1, best_T1, float("-inf"))
    return torch.cat(columns, dim=-1)


def token_choice(choice: Tensor, gate: Tensor, k: int, tokens: Tokens) -> Assignment:
    """Give every real token its k experts of highest `choice`, weighed by `gate`.

    Args:
        choice: (T, E), finite; decides who is chosen, needs no gradient.
        gate: (T, E), >= 0; weighs the output and carries the gradient.
        k: experts per token, 1 <= k <= E.

    Returns:
        T * k pairs in rank-major order: all first choices in token order, then all second ones.
    """
    expert_TK = best_experts(choice, k)
    return pairs_of(expert_TK, gate.gather(1, expert_TK), choice.shape[1], tokens)


def pairs_of(expert_TK: Tensor, weight_TK: Tensor, num_experts: int, tokens: Tokens) -> Assignment:
    """The rank-major assignment of chosen experts (T, K) and weights (T, K); padding is not
    kept.
    """
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
    )
