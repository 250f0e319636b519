"""One matrix product on a CPU, by whichever library is faster for its number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from moezoo.ops.eager import is_eager
from moezoo.ops.memory import in_huge_pages, large_empty
from moezoo.ops.observed import is_plain_tensor
from moezoo.private_torch import STEADY_ROWS, onednn_product

_TALL = 8  # a head's output is that many times wider than its input, or more
# oneDNN takes 13 us to begin: a product of a matrix in the cache and a few rows is over by then.
_SMALL_WEIGHT, _SMALL_RESULT = 2**18, 2**13
# Up to here MKL is level with oneDNN or ahead on one thread, but for very few rows; on two it is
# behind (benchmarks/experts_interface.md).
_MEDIUM_WEIGHT, _MEDIUM_ROWS = 2**19, (5, 48)
_ALWAYS = 2**62
_FEW_OUTER = 3  # rows of which outer products are added one by one
_STRETCH = 2**21  # numbers of a result that are computed in one go, 8 MiB


@dataclass(frozen=True)
class Limits:
    """For how many rows which product is the fastest; else it is `torch.mm`.

    weight_first: up to so many, one of them by pieces. onednn, onednn_transposed: from the first
    number of rows to the one before the second.
    """

    weight_first: int = 0
    onednn: tuple[int, int] = (0, 0)
    onednn_transposed: tuple[int, int] = (0, 0)

    @property
    def in_training(self) -> bool:
        """Whether products of many rows are oneDNN's, forward and backward."""
        return self.onednn[1] == self.onednn_transposed[1] == _ALWAYS


# Measured with 768 x 3,072 weights that are not in the cache (benchmarks/layer.md). MKL, which
# `torch.mm` calls, has other kernels for other makers' processors.
LIMITS = {
    "AuthenticAMD": Limits(4, onednn=(1, _ALWAYS), onednn_transposed=(3, _ALWAYS)),
    "GenuineIntel": Limits(onednn=(4, 32)),
}
# oneDNN keeps half a MiB of code for every number of rows it has met with a weight, a thousand of
# them. More rows than these are rounded up: always in training, where an expert's rows change with
# every step, else once as many numbers of rows have been met as _EXACT says. A row's bits stay.
_ROUNDED_FROM = 32
_ROUNDING = 8  # numbers of rows from one power of two to the next
_EXACT = 64
_met: set[tuple[int, int, int, bool]] = set()


@lru_cache(maxsize=1)
def limits() -> Limits:
    """Those of this machine's processor; never oneDNN where nothing was measured."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Limits()
    vendor = next((line for line in lines if line.startswith("vendor_id")), "")
    return LIMITS.get(vendor.rpartition(":")[2].strip(), Limits())


def fast_products(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` applies: float32 in main memory, of no class with operators of its own,
    outside autocast and tracing.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if not (is_plain_tensor(x) and is_plain_tensor(weight)):
        return False
    if not (x.is_cpu and weight.is_cpu) or not is_eager():
        return False
    return not torch.is_autocast_enabled("cpu")


def product(
    x: Tensor,
    weight: Tensor,
    *,
    relu: bool = False,
    training: bool = False,
    out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """x (n, K) times weight (M, K) transposed, (n, M) contiguous, with relu on top if wanted; for
    eager code, without a gradient.

    The sums are in another order than those of `F.linear`, so values differ in the last bits.

    Args:
        training: n changes from call to call, without an end.
        out: (n, M), where to write it.
        fast: what `fast_products` said of such tensors, if it was asked already.
    """
    rows = x.shape[0]
    if not rows or not x.shape[1] or not weight.shape[0]:
        return x.new_zeros(rows, weight.shape[0]) if out is None else out.zero_()
    fast = fast_products(x, weight) if fast is None else fast
    kind = _kind(rows, weight, training, out is not None) if fast else "mm"
    if kind == "mm":
        y = torch.mm(x, weight.t(), out=out)
        return y.relu_() if relu else y
    if kind == "pieces":
        y = _by_pieces(x, _pieces(weight), out)
        return y.relu_() if relu else y
    if kind == "onednn":
        wide = x if not training and _is_exact(x, weight, relu) else _rounded(x)
        # Not a slice: what autograd takes for a view may not be changed in place.
        y = _onednn(wide, weight, relu).resize_(rows, weight.shape[0])
    else:
        y = _weight_first(x, weight)
        y = y.relu_() if relu else y
    return y if out is None else out.copy_(y)


class Prepared:
    """`product` with one weight (M, K) for a fixed number of rows: what decoding calls at every
    token, so the library is chosen once.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = weight.detach()
        plain = bool(rows and weight.numel()) and fast_products(weight, weight)
        kind = _kind(rows, weight, training=False) if plain else ""
        self.transposed = self.weight.t() if kind == "mm" else None
        self.pieces = _pieces(self.weight) if kind == "pieces" else None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (rows, K) -> (rows, M), into `out` if there is one."""
        if self.transposed is not None:
            return torch.mm(x, self.transposed, out=out)
        if self.pieces is not None:
            return _by_pieces(x, self.pieces, out)
        y = product(x, self.weight)
        return y if out is None else out.copy_(y)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """total += self(x), in one go where the library can."""
        if self.transposed is not None:
            total.addmm_(x, self.transposed)
        elif self.pieces is not None:
            number = len(self.pieces)
            total.view(number, -1, 1).baddbmm_(self.pieces, _column(x, number))
        else:
            total += product(x, self.weight)


def outer_product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """a (n, M) transposed times b (n, K), the gradient of a weight, into out (M, K).

    Of very few rows a sum of outer products streams the result, where a matrix product first packs
    its operands: two rows in 0.4 to 0.5 of its time, three in 0.6 to 0.8, four in 0.9
    (768 x 512, one thread of an AMD EPYC). Only one row in half precision: two would round twice.
    """
    rows = a.shape[0]
    if not 1 <= rows <= (_FEW_OUTER if out.dtype in (torch.float32, torch.float64) else 1):
        return torch.mm(a.t(), b, out=out)
    torch.mul(a[0, :, None], b[0], out=out)
    for row in range(1, rows):
        out.addcmul_(a[row, :, None], b[row])
    return out


def shared_rows(weight: Tensor, *, training: bool) -> int:
    """Up to how many rows experts of this stack (E, M, K) on a CPU do well to share a
    `batched_product`: MKL's, in float32 and float64. Others are loops, and oneDNN's in bfloat16
    takes as long as `torch.mm` for each.
    """
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if weight.dtype not in (torch.float32, torch.float64) or not mkl:
        return 0
    if torch.get_num_threads() == 1:
        return 4  # there is nobody to wait for
    return 8 if training else 16


def batched_product(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """x (S, n, K) times weight (S, M, K) transposed, into out (S, n, M), contiguous: for few rows,
    where threads that take whole matrices need not wait for each other at each.
    """
    first = x.dtype == torch.float32 and x.shape[1] <= limits().weight_first
    if first and weight.stride(2) == 1 and weight.shape[1] >= weight.shape[2]:
        size, rows, width = x.shape
        columns = x.contiguous().as_strided((size, width, rows), (rows * width, 1, width))
        return out.copy_(torch.bmm(weight, columns).transpose(1, 2))
    return torch.bmm(x, weight.transpose(1, 2), out=out)


def batched_outer(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """a (S, n, M) transposed times b (S, n, K), into out (S, M, K)."""
    if a.shape[1] >= _FEW_OUTER and out.is_contiguous():
        return torch.bmm(a.transpose(1, 2), b, out=out)
    for one, other, place in zip(a, b, out, strict=True):
        outer_product(one, other, out=place)
    return out


def steady_product(x: Tensor, weight: Tensor) -> Tensor:
    """`product` that gives a row the same bits whatever rows are beside it, where oneDNN is there:
    for scores, in which a last bit may decide who is chosen.
    """
    if not x.numel() or not weight.numel() or not fast_products(x, weight):
        return torch.mm(x, weight.t())
    rows, outer = x.shape[0], weight.shape[0]
    if rows < STEADY_ROWS:
        return _onednn(torch.cat((x,) * -(-STEADY_ROWS // rows)), weight, relu=False)[:rows]
    if not in_huge_pages(4 * rows * outer, x.device):
        return _onednn(_rounded(x), weight, relu=False).resize_(rows, outer)
    # Some rows at a time: fresh memory for all of them would cost a page fault every 4 KiB, where
    # a stretch that fits into the cache is used again for the next one.
    out, step = large_empty((rows, outer), x.dtype), max(_STRETCH // outer, 2)
    for start in range(0, rows, step):
        out[start : start + step] = steady_product(x[start : start + step], weight)
    return out


def _kind(rows: int, weight: Tensor, training: bool, placed: bool = False) -> str:
    """The kind of a product; `placed`: its result has a place, to which oneDNN's is copied."""
    outer = weight.shape[0]
    if weight.numel() <= _SMALL_WEIGHT and rows * outer <= _SMALL_RESULT:
        return "mm"
    found, plain = limits(), weight.stride(1) == 1
    if plain and outer >= weight.shape[1]:
        if rows == 1 and found.weight_first and outer % 2 == 0 and weight.is_contiguous():
            return "pieces"
        if 1 < rows <= found.weight_first:
            return "weight first"
    first, last = _MEDIUM_ROWS
    medium = weight.numel() <= _MEDIUM_WEIGHT and torch.get_num_threads() == 1
    if medium and first <= rows and (placed or rows < last):
        return "mm"
    if training and not plain and weight.shape[1] >= _TALL * outer:
        return "mm"  # back from a head's output
    first, last = found.onednn if plain else found.onednn_transposed
    return "onednn" if first <= rows < last else "mm"


def _is_exact(x: Tensor, weight: Tensor, relu: bool) -> bool:
    """Whether oneDNN may have code of its own for this product outside training."""
    shape = (x.shape[0], *weight.shape, relu)
    if shape not in _met and len(_met) < _EXACT:
        _met.add(shape)
    return shape in _met


def _rounded(x: Tensor) -> Tensor:
    """x (n, K) with up to an eighth more rows, which hold anything; few rows stay as they are."""
    rows, width = x.shape
    if rows < _ROUNDED_FROM:
        return x
    step = max((1 << rows.bit_length() - 1) // _ROUNDING, 1)
    more = -rows % step
    if not more:
        return x
    end = x.storage_offset() + (rows + more) * width
    if x.is_contiguous() and end * x.element_size() <= x.untyped_storage().nbytes():
        return x.as_strided((rows + more, width), (width, 1))  # what follows in memory will do
    return torch.cat((x, x.new_zeros(more, width)))


def _weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """`weight @ x^T` streams the weight from memory, where `x @ weight^T` packs it first."""
    return torch.mm(weight, x.t()).t().contiguous()


def _by_pieces(x: Tensor, pieces: Tensor, out: Tensor | None = None) -> Tensor:
    """`weight @ x^T` of one row, (1, M), as a batch of pieces of the weight (P, M / P, K): MKL's
    product of a batch keeps more loads in flight than its matrix-vector product
    (benchmarks/decode.py).
    """
    number = len(pieces)
    place = None if out is None else out.view(number, -1, 1)
    y = torch.bmm(pieces, _column(x, number), out=place)
    return y.view(1, -1)


def _column(x: Tensor, number: int) -> Tensor:
    """x (1, K) as a column (K, 1) for each piece. A stride over one column says nothing, yet MKL
    takes a way that is thirty times slower where it is not K.
    """
    row = x if x.stride(1) == 1 else x.contiguous()
    return row.as_strided((number, x.shape[1], 1), (0, 1, x.shape[1]))


def _pieces(weight: Tensor) -> Tensor:
    """One for each thread, or two: on two threads four are no faster."""
    outer, inner = weight.shape
    number = 2
    while number < torch.get_num_threads() and outer % (2 * number) == 0:
        number *= 2
    return weight.view(number, outer // number, inner)


def _onednn(x: Tensor, weight: Tensor, relu: bool) -> Tensor:
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (built_in and torch.backends.mkldnn.enabled):
        out = torch.mm(x, weight.t())
        return out.relu_() if relu else out
    return onednn_product(x.contiguous(), weight, relu=relu)
