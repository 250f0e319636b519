"""Rows sorted by expert, and the plain loop that operators are compared with."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from moezoo.ops.backends import BACKENDS


def cpu_backends() -> list[str]:
    """Those that take small CPU tensors in this process: `triton` in its interpreter alone."""
    x, weight = torch.zeros(8, 16), torch.zeros(4, 8, 16)
    return [name for name, backend in BACKENDS.items() if backend.refusal(x, weight) is None]


@st.composite
def row_counts(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Counts (E,) with empty experts among them, and unused rows."""
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    return torch.tensor(counts), sum(counts) + draw(st.integers(0, 3))


def looped(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row by row, as the definition says."""
    experts = torch.arange(counts.shape[0]).repeat_interleave(counts).tolist()
    rows = [x[row] @ weight[e].t() for row, e in enumerate(experts)]
    if bias is not None:
        rows = [y + bias[e] for y, e in zip(rows, experts, strict=True)]
    unused = x.new_zeros(x.shape[0] - len(experts), weight.shape[1])
    return torch.cat([torch.stack(rows), unused]) if rows else unused
