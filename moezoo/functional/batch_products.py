"""Rows by expert times the matrices of their experts, a few experts at a time, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.functional.expert_strips import Batch
from moezoo.ops.backends import Grouped
from moezoo.ops.products import batched_outer, batched_product, fast_products, product

_GROUPED = Grouped()


def batch_products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batches: Sequence[Batch],
    *,
    out: Tensor | None = None,
    training: bool,
) -> Tensor:
    """Rows of batches of experts times their matrices, plus biases."""
    fast = fast_products(x, weight)
    if len(batches) == 1 and batches[0].size == 1:
        y = product(x, weight[batches[0].first], training=training, out=out, fast=fast)
        return y if bias is None else y.add_(bias[batches[0].first])
    start = batches[0].rows.start
    runs = [list(run) for _, run in groupby(batches, lambda batch: batch.size > 1)]
    if out is None and len(runs) == 1 and _takes_grouped(x, weight, runs[0]):
        out = _grouped(x, weight, runs[0])
        runs = []
    out = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    for run in runs:
        here = slice(run[0].rows.start - start, run[-1].rows.stop - start)
        if _takes_grouped(x[here], weight, run):
            out[here] = _grouped(x[here], weight, run)
        else:
            _one_by_one(x[here], weight, run, out[here], training=training, fast=fast)
    if bias is not None:
        for batch in batches:
            by_expert(out[batch.after(start)], batch).add_(bias[batch.experts, None])
    return out


def _one_by_one(
    x: Tensor, weight: Tensor, run: Sequence[Batch], out: Tensor, *, training: bool, fast: bool
) -> None:
    numbers = [batch.rows.stop - batch.rows.start for batch in run]
    parts = zip(run, torch.split(x, numbers), torch.split(out, numbers), strict=True)
    for batch, rows, y in parts:
        if batch.size > 1:
            matrices = weight[batch.experts]
            batched_product(by_expert(rows, batch), matrices, out=by_expert(y, batch))
        else:
            product(rows, weight[batch.first], training=training, out=y, fast=fast)


def _takes_grouped(x: Tensor, weight: Tensor, run: Sequence[Batch]) -> bool:
    """Whether `product` is `torch.mm` for each of several experts by themselves, and torch has that
    loop as one call.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or len(run) == 1 or run[0].size > 1:
        return False
    aligned = x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    return aligned and _GROUPED.refusal(x, weight) is None


def _grouped(x: Tensor, weight: Tensor, batches: Sequence[Batch]) -> Tensor:
    """Experts by themselves, in ascending order: `torch.mm` for each, without the host between."""
    first, last = batches[0].first, batches[-1].first
    numbers = [0] * (last + 1 - first)
    for batch in batches:
        numbers[batch.first - first] = batch.rows.stop - batch.rows.start
    ends = torch.tensor(list(accumulate(numbers)), dtype=torch.int32)
    return F.grouped_mm(x, weight[first : last + 1].transpose(1, 2), offs=ends)


def by_expert(rows: Tensor, batch: Batch) -> Tensor:
    """The rows of a batch (S * n, M) as (S, n, M)."""
    return rows.view(batch.size, rows.shape[0] // batch.size, rows.shape[1])


def batch_outer(a: Tensor, b: Tensor, batch: Batch, grad: Tensor) -> None:
    """grad (E, M, K)[e] = a^T b over rows (S * n, M), (S * n, K) of each expert of the batch."""
    batched_outer(by_expert(a, batch), by_expert(b, batch), out=grad[batch.experts])
