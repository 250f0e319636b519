"""Sinkhorn normalisation: the balanced soft assignment that is closest to given scores."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDEST = 300.0  # exp of twice this is still finite in float64, and no gap of scores is as wide


def column_potentials(score_GSE: Tensor, real_GS: Tensor | None, iterations: int) -> Tensor:
    """v (G, 1, E) such that exp(score + u + v), with rows summing to 1, has balanced columns.

    Every column of a group aims at its number of real tokens divided by E; padding has no part in
    it. Alternating normalisation costs two products with the exponentials (T, E) per iteration;
    those are taken in float64 and below each row's highest score, so that none overflows.
    """
    groups, size, num_experts = score_GSE.shape
    if groups * size == 0:
        return score_GSE.new_zeros(groups, 1, num_experts)
    kernel = score_GSE.double() - score_GSE.amax(dim=-1, keepdim=True).double()
    kernel = kernel.clamp_(min=-_WIDEST).exp_()
    count_G11 = kernel.new_full((groups, 1, 1), float(size))
    if real_GS is not None:
        kernel = kernel.masked_fill_(~real_GS[:, :, None], 0.0)
        count_G11 = real_GS.sum(1).to(kernel.dtype)[:, None, None]
    column_GE1 = kernel.new_ones(groups, num_experts, 1)
    for _ in range(iterations):
        row_GS1 = _inverse(kernel @ column_GE1)
        column_GE1 = count_G11 / num_experts * _inverse(kernel.mT @ row_GS1)
        # A group of padding has nothing to balance: any finite potential does.
        column_GE1 = torch.where(column_GE1 > 0, column_GE1, 1.0)
    return column_GE1.log().mT.to(score_GSE.dtype)


def transport_plan(score_GSE: Tensor, real_GS: Tensor | None, iterations: int) -> Tensor:
    """The plan (G, S, E) after so many iterations: rows sum to 1, columns towards S / E."""
    row = score_GSE + column_potentials(score_GSE, real_GS, iterations)
    plan = row.softmax(dim=-1)
    return plan if real_GS is None else torch.where(real_GS[:, :, None], plan, 0.0)


def _inverse(value: Tensor) -> Tensor:
    """1 / value, 0 where the value is 0 (a row of padding)."""
    return torch.where(value > 0, 1.0 / value, 0.0)
