"""Sinkhorn normalisation: the balanced soft assignment that is closest to given scores."""

from __future__ import annotations

import torch
from torch import Tensor


def column_potentials(score_GSE: Tensor, real_GS: Tensor | None, iterations: int) -> Tensor:
    """v (G, 1, E) such that exp(score + u + v), with rows summing to 1, has balanced columns.

    Works on logarithms, so that no score is too large. Every column of a group aims at its number
    of real tokens divided by E; padding has no part in it.
    """
    groups, size, num_experts = score_GSE.shape
    potential = score_GSE.new_zeros(groups, 1, num_experts)
    if groups * size == 0:
        return potential
    padding_GS1 = None if real_GS is None else ~real_GS[:, :, None]
    aim = score_GSE.new_full((groups, 1, 1), size / num_experts).log()
    if real_GS is not None:
        count_G = real_GS.sum(1).to(score_GSE.dtype)
        # A group of padding has nothing to balance: any finite aim does.
        aim = (count_G.clamp(min=1) / num_experts).log()[:, None, None]
    for _ in range(iterations):
        row = score_GSE + potential
        row = row - row.logsumexp(dim=-1, keepdim=True)
        if padding_GS1 is not None:
            row = row.masked_fill(padding_GS1, float("-inf"))
        step = aim - row.logsumexp(dim=1, keepdim=True)
        potential = potential + torch.where(step.isfinite(), step, 0.0)
    return potential


def transport_plan(score_GSE: Tensor, real_GS: Tensor | None, iterations: int) -> Tensor:
    """The plan (G, S, E) after so many iterations: rows sum to 1, columns towards S / E."""
    row = score_GSE + column_potentials(score_GSE, real_GS, iterations)
    plan = row.softmax(dim=-1)
    return plan if real_GS is None else torch.where(real_GS[:, :, None], plan, 0.0)
