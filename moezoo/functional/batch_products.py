"""Rows by expert times the matrices of their experts, a few experts at a time, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.functional.expert_strips import Batch, Strip
from moezoo.ops.backends import Grouped
from moezoo.ops.products import (
    batched_outer,
    batched_product,
    fast_products,
    outer_product,
    product,
)

HALVES = (torch.bfloat16, torch.float16)
_GROUPED = Grouped()


def batch_products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strip: Strip,
    *,
    out: Tensor | None = None,
    training: bool,
) -> Tensor:
    """The rows of a strip times the matrices of their experts, plus biases."""
    if strip.is_single:
        expert = strip.batches[0].first
        y = product(x, weight[expert], training=training, out=out)
        return y if bias is None else y.add_(bias[expert])
    if _takes_grouped(x, weight) and strip.ends is not None:
        # `torch.mm` for each, without the host between.
        y = F.grouped_mm(x, weight[strip.experts].transpose(1, 2), offs=strip.ends)
        out = y if out is None else out.copy_(y)
    else:
        out = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
        _one_by_one(x, weight, strip.batches, out, training=training)
    if bias is not None:
        for batch in strip.batches:
            rows = out[batch.after(strip.rows.start)]
            by_expert(rows, batch).add_(bias[batch.experts, None])
    return out


def _one_by_one(
    x: Tensor, weight: Tensor, batches: Sequence[Batch], out: Tensor, *, training: bool
) -> None:
    fast = fast_products(x, weight)
    numbers = [batch.rows.stop - batch.rows.start for batch in batches]
    parts = zip(batches, torch.split(x, numbers), torch.split(out, numbers), strict=True)
    for batch, rows, y in parts:
        if batch.size > 1:
            matrices = weight[batch.experts]
            batched_product(by_expert(rows, batch), matrices, out=by_expert(y, batch))
        else:
            product(rows, weight[batch.first], training=training, out=y, fast=fast)


def _takes_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is `torch.mm`, of which torch has a loop over experts as one call."""
    if x.dtype not in HALVES:
        return False
    aligned = x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    return aligned and _GROUPED.refusal(x, weight) is None


def by_expert(rows: Tensor, batch: Batch) -> Tensor:
    """The rows of a batch (S * n, M) as (S, n, M)."""
    return rows.view(batch.size, rows.shape[0] // batch.size, rows.shape[1])


def batch_outer(a: Tensor, b: Tensor, batch: Batch, grad: Tensor) -> None:
    """grad (E, M, K)[e] = a^T b over rows (S * n, M), (S * n, K) of each expert of the batch."""
    if batch.size == 1:
        outer_product(a, b, out=grad[batch.first])
        return
    batched_outer(by_expert(a, batch), by_expert(b, batch), out=grad[batch.experts])
