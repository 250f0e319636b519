"""Hidden units whose gate and value are the halves of one product, with their gradient by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class SiluGate:
    """(n, 2F) -> (n, F): silu of the first half times the second (SwiGLU, arXiv 2002.05202)."""

    def __call__(self, both: Tensor) -> Tensor:
        gate, value = both.chunk(2, -1)
        return F.silu(gate) * value

    def with_gradient(self, both: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The units (n, F), and the gradient (n, 2F) of `both` for theirs."""
        gate, value = both.chunk(2, -1)
        units, found = F.silu(gate), torch.empty_like(both)
        left, right = found.chunk(2, -1)
        torch.mul(grad, units, out=right)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=left)
        return units.mul_(value), found
