"""The ways to compute E products over rows that are sorted by expert, and when each is used.

A backend is an object with three methods, listed in `BACKENDS`; a kernel for another device is one
more entry there and, once it is measured on that device, one more line of `TABLE`. Its `linear` and
`outer` run inside an operator, so they may read the counts, and autograd never sees what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.errors import ConfigError, did_you_mean
from moezoo.ops.memory import stacked_gradient
from moezoo.ops.products import fast_products, outer_product, product
from moezoo.ops.rounding import rounds_float32

Runs = list[tuple[int, slice]]


class Backend(Protocol):
    """Products of row r, of expert e, with matrices of that expert."""

    def refusal(self, x: Tensor, other: Tensor) -> str | None:
        """Why it cannot multiply x (N, K) with weights (E, M, K) or rows (N, M), or None."""

    def linear(self, x: Tensor, weight: Tensor, counts: Tensor, *, tail: bool = True) -> Tensor:
        """(N, K), (E, M, K), (E,) -> (N, M), zero in rows past the counts; without `tail` these
        may hold anything.
        """

    def outer(self, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        """(N, M), (N, K), (E,) -> (E, M, K): a^T b over the rows of each expert."""


def runs_of(counts: Tensor) -> Runs:
    """The experts that have rows, with those rows. Synchronises with the device."""
    runs, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            runs.append((expert, slice(start, start + count)))
        start += count
    return runs


class Loop:
    """One product per expert that has rows."""

    def refusal(self, x: Tensor, other: Tensor) -> str | None:
        return None

    def linear(self, x: Tensor, weight: Tensor, counts: Tensor, *, tail: bool = True) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[1])
        runs = runs_of(counts)
        out[runs[-1][1].stop if runs else 0 :].zero_()
        fast = fast_products(x, weight)
        for expert, rows in runs:
            if fast:
                out[rows] = product(x[rows], weight[expert])
            else:
                # A weight of another dtype (autocast) is cast only where it is used.
                torch.mm(x[rows], weight[expert].to(x.dtype).t(), out=out[rows])
        return out

    def outer(self, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        runs = runs_of(counts)
        shape = (counts.shape[0], a.shape[1], b.shape[1])
        out = stacked_gradient(shape, a, [expert for expert, _ in runs])
        for expert, rows in runs:
            outer_product(a[rows], b[rows], out=out[expert])
        return out


class Grouped:
    """`F.grouped_mm`, one launch for all experts and no synchronisation, where it is right.

    It takes no float64, no operand whose rows are not multiples of 16 bytes, no expanded operand
    and only int32 offsets; rows past the last offset and products of empty groups come back
    uninitialised.
    """

    def refusal(self, x: Tensor, other: Tensor) -> str | None:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"grouped_mm knows no {x.dtype}"
        sizes = {x.shape[-1], *other.shape[1:]}
        if any(size == 0 or size * x.element_size() % 16 for size in sizes):
            return f"grouped_mm needs rows of multiples of 16 bytes, not {sorted(sizes)} elements"
        if x.shape[0] == 0:
            return "grouped_mm needs rows"
        return None

    def linear(self, x: Tensor, weight: Tensor, counts: Tensor, *, tail: bool = True) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        matrices = weight.to(x.dtype).transpose(1, 2)
        out = F.grouped_mm(x.contiguous(), matrices, offs=ends)
        return _cleared_rows(out, counts) if tail else out

    def outer(self, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        out = F.grouped_mm(a.contiguous().t(), b.contiguous(), offs=ends)
        return _cleared_experts(out, counts)


def _cleared_rows(out: Tensor, counts: Tensor) -> Tensor:
    """out (N, M) with zeros in the rows past the counts. A mask would read and write all of it: a
    quarter of a layer's time on a GPU, where a kernel of ours looks for what is to be cleared.
    """
    if out.is_cuda and _has_triton():
        _triton_clear().clear_rows(out, counts)
        return out
    unused_N1 = torch.arange(out.shape[0], device=out.device).unsqueeze(1) >= counts.sum()
    return out.masked_fill_(unused_N1, 0.0)


def _cleared_experts(out: Tensor, counts: Tensor) -> Tensor:
    """out (E, M, K) with zeros for experts without rows."""
    if out.is_cuda and _has_triton():
        _triton_clear().clear_experts(out, counts)
        return out
    return out.masked_fill_((counts == 0)[:, None, None], 0.0)


class Padded:
    """One batched product, every expert filled up with zeros to the fullest one's rows."""

    def refusal(self, x: Tensor, other: Tensor) -> str | None:
        return None

    def linear(self, x: Tensor, weight: Tensor, counts: Tensor, *, tail: bool = True) -> Tensor:
        place_N, capacity = _places(counts, x.shape[0])
        x_EC = _filled_up(x, place_N, counts, capacity)
        y_EC = torch.bmm(x_EC, weight.to(x.dtype).transpose(1, 2))
        out = x.new_zeros(x.shape[0], weight.shape[1])
        out[: place_N.shape[0]] = y_EC.flatten(0, 1).index_select(0, place_N)
        return out

    def outer(self, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        place_N, capacity = _places(counts, a.shape[0])
        a_EC = _filled_up(a, place_N, counts, capacity)
        return torch.bmm(a_EC.transpose(1, 2), _filled_up(b, place_N, counts, capacity))


def _places(counts: Tensor, num_rows: int) -> tuple[Tensor, int]:
    """Where each row that has an expert goes in (E * C), and C, the rows of the fullest expert."""
    capacity = int(counts.max()) if counts.numel() else 0
    start_E = counts.cumsum(0) - counts
    experts = torch.arange(counts.shape[0], device=counts.device)
    expert_N = experts.repeat_interleave(counts)
    place_N = torch.arange(expert_N.shape[0], device=counts.device) - start_E[expert_N]
    return expert_N * capacity + place_N, capacity


def _filled_up(x: Tensor, place_N: Tensor, counts: Tensor, capacity: int) -> Tensor:
    flat = x.new_zeros(counts.shape[0] * capacity, x.shape[1])
    flat.index_copy_(0, place_N, x[: place_N.shape[0]])
    return flat.view(counts.shape[0], capacity, x.shape[1])


class Triton:
    """Kernels of ours for a GPU: no synchronisation, any width, weights in any layout and dtype.

    Triton is imported when they are first asked for. On CPU tensors they run in its interpreter
    alone (TRITON_INTERPRET=1), which is for tests.
    """

    def refusal(self, x: Tensor, other: Tensor) -> str | None:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the Triton kernels know no {x.dtype}"
        if not _has_triton():
            return "triton is not installed"
        if not x.is_cuda and not (x.is_cpu and _triton_kernels().INTERPRETED):
            return f"the Triton kernels run on a GPU, not on {x.device.type}"
        if other.device != x.device:
            return f"rows are on {x.device}, weights on {other.device}"
        return None

    def linear(self, x: Tensor, weight: Tensor, counts: Tensor, *, tail: bool = True) -> Tensor:
        out: Tensor = _triton_kernels().linear(x, weight, counts)
        return out

    def outer(self, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        out: Tensor = _triton_kernels().outer(a, b, counts)
        return out


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _triton_kernels() -> ModuleType:
    from moezoo.ops import triton_kernels

    return triton_kernels


def _triton_clear() -> ModuleType:
    from moezoo.ops import triton_clear

    return triton_clear


BACKENDS: dict[str, Backend] = {
    "loop": Loop(),
    "grouped": Grouped(),
    "padded": Padded(),
    "triton": Triton(),
}


@dataclass(frozen=True)
class Choice:
    """`backend` for tensors on `device` (None: any) of one of `dtypes` (None: any), from
    `rows` rows per expert and `total` rows in all on, on GPUs of one of the compute capabilities
    `majors` (None: any); `rounded`: where torch may round the operands of products of float32.
    """

    backend: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    rows: int = 0
    total: int = 0
    majors: tuple[int, ...] | None = None
    rounded: bool = False

    def fits(self, x: Tensor, rows: int) -> bool:
        """Whether this line is meant for x and so many rows per expert."""
        if self.device not in (None, x.device.type) or rows < self.rows:
            return False
        if x.shape[0] < self.total:
            return False
        if self.rounded and not rounds_float32():
            return False
        if self.dtypes is not None and x.dtype not in self.dtypes:
            return False
        return self.majors is None or _major(x.device) in self.majors


@cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


# The first line that fits and does not refuse. For a CPU as measured in benchmarks/layer.md
# ("Backends"): the loop was ahead or level for every dtype from 1 to 1,024 rows per expert. For a
# GPU as in benchmarks/gpu.md: torch has a grouped kernel for bfloat16 on Hopper and on Blackwell of
# data centres (10.x), which is the fastest for many rows; of few the host is the limit, and the
# Triton kernels are less work for it. For other dtypes and cards `grouped_mm` waits for the device
# and loops, and so the Triton kernels are ahead, but for exact products of float32.
_HALVES = (torch.bfloat16, torch.float16)
TABLE = (
    Choice("loop", device="cpu"),
    Choice("grouped", device="cuda", dtypes=(torch.bfloat16,), majors=(9, 10), total=1 << 15),
    Choice("triton", device="cuda", dtypes=_HALVES),
    Choice("triton", device="cuda", dtypes=(torch.float32,), rounded=True),
    Choice("grouped", device="cuda", dtypes=(*_HALVES, torch.float32)),
    Choice("loop"),
)


def never_waits(x: Tensor) -> bool:
    """Whether no product of rows like x that "auto" may choose makes the host wait for a GPU."""
    if not (x.is_cuda and _has_triton()):
        return False
    return x.dtype in _HALVES or (x.dtype == torch.float32 and rounds_float32())


def choose(name: str, x: Tensor, other: Tensor, counts: Tensor) -> Backend:
    """The backend of that name, or for "auto" the one of the table.

    Raises ConfigError for an unknown name, and for a backend that cannot take these tensors.
    """
    if name != "auto":
        return _named(name, x, other)
    per_expert = x.shape[0] // max(counts.shape[0], 1)
    for choice in TABLE:
        backend = BACKENDS[choice.backend]
        if choice.fits(x, per_expert) and backend.refusal(x, other) is None:
            return backend
    raise AssertionError("the last line of the table takes everything")


def _named(name: str, x: Tensor, other: Tensor) -> Backend:
    if name not in BACKENDS:
        hint = did_you_mean(name, [*BACKENDS, "auto"])
        raise ConfigError(f"unknown backend {name!r}", field="backend", hint=hint)
    reason = BACKENDS[name].refusal(x, other)
    if reason:
        hint = "Use backend='auto'."
        raise ConfigError(f"backend {name!r}: {reason}", field="backend", hint=hint)
    return BACKENDS[name]
