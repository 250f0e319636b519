"""Rows by expert times the matrices of their experts, a few experts at a time, on a CPU."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.ops.backends import Grouped, Runs
from moezoo.ops.products import fast_products, product

_GROUPED = Grouped()
# Of fewer rows an expert, and of larger matrices, products one by one are faster.
_FEW_ROWS, _MEDIUM = 5, 2**19
# Stacks of up to so many numbers may lie in the cache, where `torch.mm` is the fastest for one row;
# from memory it takes a third longer than what `product` chooses, which is twice as slow here.
_RESIDENT = 2**22


def run_products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Runs,
    start: int,
    *,
    out: Tensor | None = None,
    training: bool,
) -> Tensor:
    """Rows of consecutive experts times their matrices, plus biases; `start`: the first row."""
    fast = weight.numel() > _RESIDENT and fast_products(x, weight)
    if len(runs) == 1:
        expert = runs[0][0]
        y = product(x, weight[expert], training=training, out=out, fast=fast)
        return y if bias is None else y.add_(bias[expert])
    if bias is None and x.shape[0] >= _FEW_ROWS * len(runs) and _takes_grouped(x, weight):
        y = _grouped(x, weight, runs, start)
        return y if out is None else out.copy_(y)
    out = x.new_empty(x.shape[0], weight.shape[1]) if out is None else out
    for expert, rows in runs:
        here = slice(rows.start - start, rows.stop - start)
        y = product(x[here], weight[expert], training=training, out=out[here], fast=fast)
        if bias is not None:
            y.add_(bias[expert])
    return out


def _takes_grouped(x: Tensor, weight: Tensor) -> bool:
    plain = x.dtype == torch.float32 and weight[0].numel() <= _MEDIUM
    aligned = x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    return plain and aligned and _GROUPED.refusal(x, weight) is None


def _grouped(x: Tensor, weight: Tensor, runs: Runs, start: int) -> Tensor:
    """The same as one call, which loops over experts without the host."""
    first, last = runs[0][0], runs[-1][0]
    stops = dict.fromkeys(range(first, last + 1), 0) | {e: r.stop - start for e, r in runs}
    ends = torch.tensor(list(accumulate(stops.values(), max)), dtype=torch.int32)
    return F.grouped_mm(x, weight[first : last + 1].transpose(1, 2), offs=ends)


def rows_alone(x: Tensor, weight: Tensor, bias: Tensor | None, ids: list[int]) -> Tensor:
    """Row i times the matrix of expert ids[i], plus its bias."""
    out = x.new_empty(len(ids), weight.shape[1])
    fast = weight.numel() > _RESIDENT and fast_products(x, weight)
    for number, expert in enumerate(ids):
        place = out[number : number + 1]
        product(x[number : number + 1], weight[expert], out=place, fast=fast)
        if bias is not None:
            place.add_(bias[expert])
    return out
