"""Triton kernels that zero what grouped products of torch leave uninitialised, and nothing else.

A program that finds nothing to clear ends after reading the counts, which never leave the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.ops.triton_kernels import INTERPRETED, find_rows

_ROWS, _COLS = (16, 16) if INTERPRETED else (32, 256)
_SPAN = 4 * _COLS if INTERPRETED else 1 << 16  # numbers that one program clears


@triton.jit
def clear_rows_kernel(
    out_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    num_cols: tl.tensor,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    start, _ = find_rows(counts_ptr, num_rows, num_experts, num_experts, EXPERTS)
    first = tl.program_id(0) * ROWS
    if first + ROWS <= start:
        return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    unused = (rows >= start) & (rows < num_rows)
    zeros = tl.zeros((ROWS, COLS), dtype=out_ptr.dtype.element_ty)
    for begin in range(0, num_cols, COLS):
        cols = begin + tl.arange(0, COLS)
        inside = unused[:, None] & (cols < num_cols)[None, :]
        tl.store(out_ptr + rows[:, None] * num_cols + cols[None, :], zeros, mask=inside)


@triton.jit
def clear_experts_kernel(
    out_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    size: tl.tensor,
    SPAN: tl.constexpr,
    COLS: tl.constexpr,
):
    expert = tl.program_id(1)
    if tl.load(counts_ptr + expert) > 0:
        return
    begin = tl.program_id(0) * SPAN
    zeros = tl.zeros((COLS,), dtype=out_ptr.dtype.element_ty)
    for offset in range(0, SPAN, COLS):
        place = begin + offset + tl.arange(0, COLS)
        tl.store(out_ptr + expert.to(tl.int64) * size + place, zeros, mask=place < size)


def clear_rows(out: Tensor, counts: Tensor) -> None:
    """Zeros in place of the rows of out (N, M), contiguous, past counts.sum()."""
    num_rows, num_cols = out.shape
    if out.numel():
        experts = counts.shape[0]
        with torch.cuda.device_of(out):
            clear_rows_kernel[(triton.cdiv(num_rows, _ROWS),)](
                out, counts.contiguous(), num_rows, experts, num_cols,
                EXPERTS=triton.next_power_of_2(experts + 1), ROWS=_ROWS, COLS=_COLS,
            )  # fmt: skip


def clear_experts(out: Tensor, counts: Tensor) -> None:
    """Zeros in place of the matrices of out (E, M, K), contiguous, of experts with no count."""
    experts, size = counts.shape[0], out[0].numel() if out.shape[0] else 0
    if out.numel():
        with torch.cuda.device_of(out):
            clear_experts_kernel[(triton.cdiv(size, _SPAN), experts)](
                out, counts.contiguous(), size, SPAN=_SPAN, COLS=_COLS
            )
