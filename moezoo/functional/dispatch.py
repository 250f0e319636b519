"""Dispatch and combine: the two linear maps around the experts (docs/architecture.md, the law)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from moezoo.functional.queues import occurrences, pairs_per_expert
from moezoo.ops.eager import is_eager
from moezoo.ops.row_sums import row_sums
from moezoo.records import Assignment, Slots, SoftAssignment


@dataclass(frozen=True)
class Order:
    """Which pair stands in which row.

    Fields: pair (N,), that of each row; token (N,), its token; rows (T, K), in which rows a token's
    pairs stand, or None where their number varies. int64.
    """

    pair: Tensor
    token: Tensor
    rows: Tensor | None


def dispatch(x_TD: Tensor, assignment: Assignment) -> tuple[Slots, Order]:
    """Copy kept tokens into rows sorted by expert.

    Returns:
        The slots (N rows; those past the kept pairs are unused), and what stands where.
    """
    a = assignment
    if a.num_pairs == 1:  # one token to decode: nothing to sort
        count_E = pairs_per_expert(a)
        row = x_TD if a.num_tokens == 1 else x_TD.index_select(0, a.token)
        first = torch.zeros_like(a.token)
        return Slots(row, count_E), Order(first, a.token, first[:, None] if a.choices else None)
    key_N = torch.where(a.kept, a.expert, a.num_experts)
    order = _order(a, _sorted_pairs(key_N, a.num_experts))
    count_E = occurrences(key_N, a.num_experts + 1)
    if x_TD.requires_grad and order.rows is not None and is_eager():
        spread: Tensor = _Spread.apply(x_TD, order.token, order.rows)  # type: ignore[no-untyped-call]
        return Slots(spread, count_E[:-1]), order
    return Slots(x_TD.index_select(0, order.token), count_E[:-1]), order


def combine(y_ND: Tensor, assignment: Assignment, order: Order) -> Tensor:
    """Weigh the experts' rows and add them up per token: (T, D), zero for tokens without a kept
    pair.
    """
    a = assignment
    weight_N = torch.where(a.kept, a.weight, 0.0)
    if a.num_pairs == a.num_tokens == 1:
        return y_ND * weight_N.unsqueeze(-1).to(y_ND.dtype)
    if order.rows is not None and a.choices == 1:
        weight_T = weight_N if a.rank_major else weight_N[order.pair[order.rows[:, 0]]]
        out_TD = _collected(y_ND, order.token, order.rows)
        return out_TD * weight_T.unsqueeze(-1).to(y_ND.dtype)
    weight_N = weight_N[order.pair]
    weighted_ND = y_ND * weight_N.unsqueeze(-1).to(y_ND.dtype)
    if order.rows is not None:
        return _collected(weighted_ND, order.token, order.rows)
    out_TD = y_ND.new_zeros(a.num_tokens, y_ND.shape[1])
    return out_TD.index_add(0, order.token, weighted_ND)


def split_weights(assignment: Assignment, order: Order) -> tuple[Tensor, Assignment]:
    """Weights of rows (N,) as far as they are at most 1, for experts that multiply by them, and
    the assignment with what is left of each for `combine`. The product of both is the weight.
    """
    weight_N = assignment.weight
    above_N = weight_N > 1.0
    rest = replace(assignment, weight=torch.where(above_N, weight_N, 1.0))
    return torch.where(above_N, 1.0, weight_N)[order.pair], rest


def _sorted_pairs(key_N: Tensor, num_experts: int) -> Tensor:
    """The pairs (N,) by their key, equal ones in list order."""
    if key_N.is_cuda and num_experts < torch.iinfo(torch.int16).max:
        key_N = key_N.to(torch.int16)  # a GPU sorts byte by byte
    return key_N.sort(stable=True).indices


def _order(assignment: Assignment, pair_N: Tensor) -> Order:
    a = assignment
    if not a.choices:
        return Order(pair_N, a.token[pair_N], None)
    place_N = torch.arange(pair_N.shape[0], device=pair_N.device)
    row_N = torch.empty_like(pair_N).scatter_(0, pair_N, place_N)
    if a.rank_major:
        token_N = pair_N if a.choices == 1 else pair_N % max(a.num_tokens, 1)
        return Order(pair_N, token_N, row_N.view(a.choices, a.num_tokens).t())
    by_token_N = row_N[a.token.argsort(stable=True)]
    return Order(pair_N, a.token[pair_N], by_token_N.view(a.num_tokens, a.choices))


def _collected(y_ND: Tensor, token_N: Tensor, rows_TK: Tensor) -> Tensor:
    if y_ND.requires_grad and is_eager():
        out: Tensor = _Collect.apply(y_ND, token_N, rows_TK)  # type: ignore[no-untyped-call]
        return out
    return row_sums(y_ND, rows_TK)


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
        return row_sums(y_ND, rows_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grad_TD, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


def soft_dispatch(x_TD: Tensor, assignment: SoftAssignment) -> Slots:
    """Mix tokens into slots: rows sorted by expert, then group, then slot (Soft MoE, eq. 1)."""
    groups, size, experts, slots = assignment.dispatch.shape
    x_GSD = rearrange(x_TD, "(g s) d -> g s d", g=groups, s=size)  # both: either may be 0
    mixed = torch.einsum("gsd,gsep->egpd", x_GSD, assignment.dispatch.to(x_TD.dtype))
    count_E = torch.full((experts,), groups * slots, dtype=torch.int64, device=x_TD.device)
    return Slots(rearrange(mixed, "e g p d -> (e g p) d"), count_E)


def soft_combine(y_ND: Tensor, assignment: SoftAssignment) -> Tensor:
    """Mix slots back into tokens: (T, D) (Soft MoE, eq. 3)."""
    groups, _, experts, slots = assignment.combine.shape
    y_EGPD = rearrange(y_ND, "(e g p) d -> e g p d", e=experts, g=groups, p=slots)
    out_GSD = torch.einsum("egpd,gsep->gsd", y_EGPD, assignment.combine.to(y_ND.dtype))
    return rearrange(out_GSD, "g s d -> (g s) d")
