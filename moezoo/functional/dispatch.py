"""Dispatch and combine: the two linear maps around the experts (docs/architecture.md, the law)."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.records import Assignment, Slots, SoftAssignment


def dispatch(x_TD: Tensor, assignment: Assignment) -> tuple[Slots, Tensor]:
    """Copy kept tokens into rows sorted by expert.

    Returns:
        The slots (N rows; those past the kept ones belong to nobody), and order (N,): the pair in
        each row.
    """
    a = assignment
    if a.num_pairs == 1:  # one token to decode: nothing to sort
        count_E = torch.zeros(a.num_experts, dtype=torch.int64, device=a.expert.device)
        count_E.index_add_(0, a.expert, a.kept.long())
        return Slots(x_TD.index_select(0, a.token), count_E), torch.zeros_like(a.token)
    key_N = torch.where(a.kept, a.expert, a.num_experts)
    sorted_N, order_N = key_N.sort(stable=True)
    count_E = torch.zeros(a.num_experts + 1, dtype=torch.int64, device=key_N.device)
    count_E.index_add_(0, sorted_N, torch.ones_like(sorted_N))
    return Slots(x_TD.index_select(0, a.token[order_N]), count_E[:-1]), order_N


def combine(y_ND: Tensor, assignment: Assignment, order_N: Tensor) -> Tensor:
    """Weigh the experts' rows and add them up per token: (T, D), zero for tokens without a kept
    pair.
    """
    a = assignment
    weight_N = torch.where(a.kept, a.weight, a.weight.new_zeros(()))[order_N]
    weighted_ND = y_ND * weight_N.unsqueeze(-1).to(y_ND.dtype)
    if a.num_pairs == a.num_tokens == 1:
        return weighted_ND
    if a.choices:
        by_token_N = torch.empty_like(order_N)
        by_token_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
        rows_N = by_token_N[a.token.argsort(stable=True)]
        return (
            weighted_ND.index_select(0, rows_N).view(a.num_tokens, a.choices, y_ND.shape[1]).sum(1)
        )
    out_TD = y_ND.new_zeros(a.num_tokens, y_ND.shape[1])
    return out_TD.index_add(0, a.token[order_N], weighted_ND)


def soft_dispatch(x_TD: Tensor, assignment: SoftAssignment) -> Slots:
    """Mix tokens into slots: rows sorted by expert, then group, then slot (Soft MoE, eq. 1)."""
    groups, size, experts, slots = assignment.dispatch.shape
    x_GSD = x_TD.view(groups, size, x_TD.shape[1])
    mixed = torch.einsum("gsd,gsep->egpd", x_GSD, assignment.dispatch.to(x_TD.dtype))
    count_E = torch.full((experts,), groups * slots, dtype=torch.int64, device=x_TD.device)
    return Slots(mixed.reshape(experts * groups * slots, x_TD.shape[1]), count_E)


def soft_combine(y_ND: Tensor, assignment: SoftAssignment) -> Tensor:
    """Mix slots back into tokens: (T, D) (Soft MoE, eq. 3)."""
    groups, size, experts, slots = assignment.combine.shape
    y_EGPD = y_ND.view(experts, groups, slots, y_ND.shape[1])
    out_GSD = torch.einsum("egpd,gsep->gsd", y_EGPD, assignment.combine.to(y_ND.dtype))
    return out_GSD.reshape(groups * size, y_ND.shape[1])
