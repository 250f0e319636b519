"""Dropout whose mask costs less than the matrix products around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """Zero each element with probability p and divide the others by the probability of staying.

    On a CPU, torch draws one Bernoulli number per element, on one thread: as slow as all matrix
    products of a training step together. Here one 64-bit draw decides four elements: p is rounded
    to 1 / 65536, the scale is that of the rounded p, so the expectation is exact. Elsewhere, and
    under `torch.compile`, this is `F.dropout`.
    """
    if not training or p == 0.0:
        return x
    plain = x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()
    threshold = round(p * _LEVELS)
    if not plain or not 0 < threshold < _LEVELS:
        return F.dropout(x, p, training=True)
    out: Tensor = _Dropout.apply(x, threshold)  # type: ignore[no-untyped-call]
    return out


def kept(shape: torch.Size, threshold: int) -> Tensor:
    """A bool tensor, each element False with probability threshold / 65536; drawn from torch's
    global generator.
    """
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[:count] >= threshold - _LEVELS // 2).view(shape)


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        mask = kept(x.shape, threshold)
        ctx.save_for_backward(mask)
        ctx.scale = _LEVELS / (_LEVELS - threshold)
        return _scaled(x, mask, ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _scaled(grad, mask, ctx.scale), None


def _scaled(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    # `where` and not a product: NaN and infinity are dropped like any other value.
    return torch.where(mask, x, x.new_zeros(())).mul_(scale)
