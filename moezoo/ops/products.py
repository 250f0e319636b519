"""One matrix product on a CPU, by whichever library is faster for its number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

# Measured with 768 x 3,072 weights that are not in the cache (benchmarks/layer.md).
_FEW_ROWS = 4
_FEW_ROWS_TALL = 8  # for heads, whose output is much wider than their input
_TALL = 8
_FEW_ROWS_TRANSPOSED = 2
# oneDNN takes 13 us to begin: a product of a matrix in the cache and a few rows is over by then.
_SMALL_WEIGHT, _SMALL_RESULT = 2**18, 2**13


def fast_products(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` applies: float32 in main memory, outside autocast and tracing."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if not (x.is_cpu and weight.is_cpu) or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled("cpu")


def product(x: Tensor, weight: Tensor, *, relu: bool = False) -> Tensor:
    """x (n, K) times weight (M, K) transposed, (n, M) contiguous, with relu on top if wanted; for
    eager code, without a gradient.

    The sums are in another order than those of `F.linear`, so values differ in the last bits.
    """
    rows = x.shape[0]
    if not fast_products(x, weight):
        out = torch.mm(x, weight.t())
    elif not rows or not x.shape[1] or not weight.shape[0]:
        out = x.new_zeros(rows, weight.shape[0])
    elif weight.numel() <= _SMALL_WEIGHT and rows * weight.shape[0] <= _SMALL_RESULT:
        out = torch.mm(x, weight.t())
    elif weight.stride(1) == 1 and rows <= _few_rows(weight):
        out = _weight_first(x, weight)
    elif weight.stride(1) == 1 or rows > _FEW_ROWS_TRANSPOSED:
        return _onednn(x, weight, relu)
    else:
        out = torch.mm(x, weight.t())
    return out.relu_() if relu else out


def _few_rows(weight: Tensor) -> int:
    outer, inner = weight.shape
    if outer < inner:
        return 0
    return _FEW_ROWS_TALL if outer >= _TALL * inner else _FEW_ROWS


def _weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x^T` streams the weight from memory, where `x @ weight^T` packs it first; and a
    product of two equal columns beats the matrix-vector product of MKL, which does not keep enough
    loads in flight (benchmarks/decode.py).
    """
    if x.shape[0] == 1:
        return torch.mm(weight, torch.cat((x, x)).t())[:, 0].contiguous()[None]
    return torch.mm(weight, x.t()).t().contiguous()


def _onednn(x: Tensor, weight: Tensor, relu: bool) -> Tensor:
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (built_in and torch.backends.mkldnn.enabled):
        out = torch.mm(x, weight.t())
        return out.relu_() if relu else out
    # The operator that torch.compile itself emits for a linear layer on a CPU.
    attribute = "relu" if relu else "none"
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight, None, attribute, [], None
    )
    return fused
