"""Triton kernels for products over rows sorted by expert, for GPUs.

The host looks at shapes alone and the kernels read the counts on the device, so a launch never
waits for it and a CUDA graph of one holds for any counts. The grid has as many programs as the
worst counts need; a program that finds no rows ends at once. Sums are float32. Tiles have the sizes
that were fastest on an H200 (benchmarks/gpu.md), where they fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.ops.rounding import rounds_float32

# What TRITON_INTERPRET=1 said when this module was imported: the kernels below run on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tiling:
    """One program makes (rows, cols) of a product, `depth` summands at a time, in so many warps and
    with the summands of so many steps on their way from memory.
    """

    rows: int = 128
    cols: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3

    def programs(self, num_rows: int, num_experts: int) -> int:
        """Tiles of rows that any counts of `num_rows` rows fit into, unused ones among them."""
        groups = min(num_experts + 1, num_rows)
        return (num_rows + groups * (self.rows - 1)) // self.rows


# The interpreter is slow and tests are small: small tiles bring every border into them.
_INTERPRETED = Tiling(16, 16, 16)


def tiling(*operands: Tensor) -> Tiling:
    """The tiles for products of these operands on their device."""
    if INTERPRETED:
        return _INTERPRETED
    size = max(operand.element_size() for operand in operands)
    return fitting_tiling(_shared_memory(operands[0].device.index), size)


def fitting_tiling(shared_memory: int, element_size: int) -> Tiling:
    """The tiles for so many bytes of shared memory per block, and per number."""
    depth = 128 // element_size
    for cols, stages in ((256, 3), (128, 3), (128, 2)):
        tile = Tiling(cols=cols, depth=depth, stages=stages)
        if stages * (tile.rows + cols) * depth * element_size <= shared_memory:
            return tile
    return Tiling(rows=64, cols=64, depth=depth, warps=4, stages=2)


@cache
def _shared_memory(device: int) -> int:
    found = torch.cuda.get_device_properties(device)
    most: int = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return most


def constants(tile: Tiling, num_experts: int) -> dict[str, Any]:
    """What every kernel is specialised for, and how it is compiled."""
    return {
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "PRECISION": "tf32" if rounds_float32() else "ieee",
        "UPCAST": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,  # as Triton does by itself up to 3.9, with a warning since
    }


@triton.jit
def find_rows(
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    place: tl.tensor,
    EXPERTS: tl.constexpr,
):
    """The first row of expert `place`, and the row after its last."""
    e = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
    start = tl.sum(tl.where(e < place, counts, 0))
    return start, tl.minimum(start + tl.sum(tl.where(e == place, counts, 0)), num_rows)


@triton.jit
def find_tile(
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The expert of this program, its first row, and the row after the last of that expert.

    Rows past the counts are those of expert `num_experts`. A program that is one too many gets a
    first row that is not before the last.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
    unused = tl.maximum(num_rows - tl.sum(counts), 0)
    counts = tl.where(e == num_experts, unused, counts)
    tiles = (counts + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32))
    start = tl.sum(tl.where(e < expert, counts, 0))
    first = start + (tile - tl.sum(tl.where(e < expert, tiles, 0))) * ROWS
    end = tl.minimum(start + tl.sum(tl.where(e == expert, counts, 0)), num_rows)
    return expert, first, end


@triton.jit
def multiply(
    x_ptr: tl.tensor,
    place: tl.tensor,
    valid: tl.tensor,
    stride_x: tl.tensor,
    stride_xk: tl.tensor,
    weight_ptr: tl.tensor,
    cols: tl.tensor,
    num_cols: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    depth: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(ROWS, COLS) float32: rows `place` of x times rows `cols` of one expert's weight."""
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    k = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + place[:, None] * stride_x + k[None, :] * stride_xk
    w_ptrs = weight_ptr + cols[None, :] * stride_m + k[:, None] * stride_k
    for start in range(0, depth, DEPTH):
        inside = start + k < depth
        a = tl.load(x_ptrs, mask=valid[:, None] & inside[None, :], other=0.0)
        b = tl.load(w_ptrs, mask=inside[:, None] & (cols < num_cols)[None, :], other=0.0)
        b = b.to(a.dtype)
        if UPCAST:  # the interpreter would multiply the bits of a bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_ptrs += DEPTH * stride_xk
        w_ptrs += DEPTH * stride_k
    return total


@triton.jit
def linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    num_cols: tl.tensor,
    depth: tl.tensor,
    stride_x: tl.tensor,
    stride_xk: tl.tensor,
    stride_e: tl.tensor,
    stride_m: tl.tensor,
    stride_k: tl.tensor,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert, first, end = find_tile(counts_ptr, num_rows, num_experts, EXPERTS, ROWS)
    if first >= end:
        return
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    valid = rows < end
    total = multiply(
        x_ptr,
        rows,
        valid,
        stride_x,
        stride_xk,
        weight_ptr + expert.to(tl.int64) * stride_e,
        cols,
        num_cols,
        stride_m,
        stride_k,
        tl.where(expert < num_experts, depth, 0),
        ROWS,
        COLS,
        DEPTH,
        PRECISION,
        UPCAST,
    )
    out_ptrs = out_ptr + rows[:, None] * num_cols + cols[None, :]
    inside = valid[:, None] & (cols < num_cols)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_place_ptr: tl.tensor,
    b_place_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    width_a: tl.tensor,
    width_b: tl.tensor,
    stride_a: tl.tensor,
    stride_am: tl.tensor,
    stride_b: tl.tensor,
    stride_bk: tl.tensor,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    expert = tl.program_id(2)
    start, end = find_rows(counts_ptr, num_rows, num_experts, expert, EXPERTS)
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for first in range(start, end, DEPTH):
        rows = (first + tl.arange(0, DEPTH)).to(tl.int64)
        valid = rows < end
        a_rows = tl.load(a_place_ptr + rows, mask=valid, other=0) if GATHER_A else rows
        b_rows = tl.load(b_place_ptr + rows, mask=valid, other=0) if GATHER_B else rows
        a_ptrs = a_ptr + m[:, None] * stride_am + a_rows[None, :] * stride_a
        b_ptrs = b_ptr + b_rows[:, None] * stride_b + k[None, :] * stride_bk
        a = tl.load(a_ptrs, mask=(m < width_a)[:, None] & valid[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=valid[:, None] & (k < width_b)[None, :], other=0.0)
        b = b.to(a.dtype)
        if UPCAST:  # see multiply
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * width_a * width_b
    out_ptrs += m[:, None] * width_b + k[None, :]
    inside = (m < width_a)[:, None] & (k < width_b)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


def linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """(N, K), (E, M, K) of any strides and dtype, (E,) -> (N, M), zero in rows past the counts."""
    (num_rows, depth), (num_experts, num_cols, _) = x.shape, weight.shape
    out = x.new_empty(num_rows, num_cols)
    if out.numel():
        tile = tiling(x, weight)
        grid = (tile.programs(num_rows, num_experts), triton.cdiv(num_cols, tile.cols))
        sizes = (num_rows, num_experts, num_cols, depth)
        with torch.cuda.device_of(x):
            linear_kernel[grid](
                x,
                weight,
                counts.contiguous(),
                out,
                *sizes,
                *x.stride(),
                *weight.stride(),
                **constants(tile, num_experts),
            )
    return out


def outer(
    a: Tensor,
    b: Tensor,
    counts: Tensor,
    *,
    a_rows: Tensor | None = None,
    b_rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """a^T b over the rows of each expert: (E, M, K) of `dtype`, zero for experts without rows.

    Args:
        a: (N, M). b: (N, K). counts: (E,).
        a_rows: (N,) int64 or None; row r is then a[a_rows[r]], of any number of rows. b_rows: the
            same for b.
    """
    num_rows = a.shape[0] if a_rows is None else a_rows.shape[0]
    num_experts, width_a, width_b = counts.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty(num_experts, width_a, width_b, dtype=dtype or a.dtype)
    if out.numel():
        tile = tiling(a, b)
        grid = (triton.cdiv(width_a, tile.rows), triton.cdiv(width_b, tile.cols), num_experts)
        sizes = (num_rows, num_experts, width_a, width_b)
        with torch.cuda.device_of(a):
            outer_kernel[grid](
                a,
                b,
                counts if a_rows is None else a_rows.contiguous(),
                counts if b_rows is None else b_rows.contiguous(),
                counts.contiguous(),
                out,
                *sizes,
                *a.stride(),
                *b.stride(),
                GATHER_A=a_rows is not None,
                GATHER_B=b_rows is not None,
                **constants(tile, num_experts),
            )
    return out
