"""Dispatch and combine: the two linear maps around the experts (docs/architecture.md, the law)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo.ops.eager import is_eager
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
        row = x_TD if a.num_tokens == 1 else x_TD.index_select(0, a.token)
        return Slots(row, count_E), a.token.new_zeros(1)
    key_N = torch.where(a.kept, a.expert, a.num_experts)
    sorted_N, order_N = key_N.sort(stable=True)
    count_E = torch.zeros(a.num_experts + 1, dtype=torch.int64, device=key_N.device)
    count_E.index_add_(0, sorted_N, torch.ones_like(sorted_N))
    if x_TD.requires_grad and _by_hand(a):
        rows_TK = _rows_by_token(a, order_N)
        spread: Tensor = _Spread.apply(x_TD, a.token[order_N], rows_TK)  # type: ignore[no-untyped-call]
        return Slots(spread, count_E[:-1]), order_N
    return Slots(x_TD.index_select(0, a.token[order_N]), count_E[:-1]), order_N


def combine(y_ND: Tensor, assignment: Assignment, order_N: Tensor) -> Tensor:
    """Weigh the experts' rows and add them up per token: (T, D), zero for tokens without a kept
    pair.
    """
    a = assignment
    weight_N = torch.where(a.kept, a.weight, 0.0)
    if a.num_pairs == a.num_tokens == 1:
        return y_ND * weight_N.unsqueeze(-1).to(y_ND.dtype)
    weight_N = weight_N[order_N]
    if a.choices == 1 and a.num_tokens > 1:
        rows_T1 = _rows_by_token(a, order_N)
        out_TD = _collected(y_ND, rows_T1, a, order_N)
        weight_T1 = weight_N[rows_T1].to(y_ND.dtype)
        # Without a gradient nobody else has seen this copy.
        return out_TD * weight_T1 if torch.is_grad_enabled() else out_TD.mul_(weight_T1)
    weighted_ND = y_ND * weight_N.unsqueeze(-1).to(y_ND.dtype)
    if a.choices:
        return _collected(weighted_ND, _rows_by_token(a, order_N), a, order_N)
    out_TD = y_ND.new_zeros(a.num_tokens, y_ND.shape[1])
    return out_TD.index_add(0, a.token[order_N], weighted_ND)


def _rows_by_token(assignment: Assignment, order_N: Tensor) -> Tensor:
    """(T, K): in which row each pair of a token stands, in list order."""
    a = assignment
    row_N = torch.empty_like(order_N)
    row_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    if a.choices == 1:
        rows_T = torch.empty_like(row_N)
        rows_T[a.token] = row_N
    else:
        rows_T = row_N[a.token.argsort(stable=True)]
    return rows_T.view(a.num_tokens, a.choices)


def _collected(y_ND: Tensor, rows_TK: Tensor, assignment: Assignment, order_N: Tensor) -> Tensor:
    if y_ND.requires_grad and _by_hand(assignment):
        out: Tensor = _Collect.apply(y_ND, assignment.token[order_N], rows_TK)  # type: ignore[no-untyped-call]
        return out
    return _collect(y_ND, rows_TK)


def _collect(y_ND: Tensor, rows_TK: Tensor) -> Tensor:
    taken = y_ND.index_select(0, rows_TK.reshape(-1))
    if rows_TK.shape[1] == 1:
        return taken
    return taken.view(*rows_TK.shape, y_ND.shape[1]).sum(1)


def _by_hand(assignment: Assignment) -> bool:
    return bool(assignment.choices) and is_eager()


class _Spread(torch.autograd.Function):
    """x (T, D) -> (N, D), row r from token token_N[r]. Its transpose gathers, where that of
    `index_select` adds row after row.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_N, rows_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return _Collect.apply(grad_ND, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _Collect(torch.autograd.Function):
    """y (N, D) -> (T, D), the sum over the rows of each token: the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, token_N: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_N, rows_TK)
        return _collect(y_ND, rows_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grad_TD, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


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
