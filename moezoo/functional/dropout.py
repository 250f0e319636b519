"""Dropout whose mask costs less than the matrix products around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.ops.eager import is_eager

LEVELS = 1 << 16


def dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """Zero each element with probability p and divide the others by the probability of staying.

    On a CPU, torch draws one Bernoulli number per element, on one thread: a sixth of the time of a
    training step. Here one 64-bit draw decides four elements: p is rounded to 1 / 65536, the scale
    is that of the rounded p, so the expectation is exact. Elsewhere, and under `torch.compile`,
    this is `F.dropout`.
    """
    if not training or p == 0.0:
        return x
    threshold = round(p * LEVELS)
    if not _cheap(x, threshold):
        return F.dropout(x, p, training=True)
    out: Tensor = _Dropout.apply(x, threshold)  # type: ignore[no-untyped-call]
    return out


def relu_dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """dropout(relu(x)): backward needs nothing but the result, so no mask is kept."""
    threshold = round(p * LEVELS)
    if not training or p == 0.0 or not _cheap(x, threshold):
        return dropout(F.relu(x), p, training=training)
    out: Tensor = _ReluDropout.apply(x, threshold)  # type: ignore[no-untyped-call]
    return out


def dropout_mask(shape: torch.Size, threshold: int) -> Tensor:
    """An int8 tensor, each element 0 with probability threshold / 65536, else 1; drawn from torch's
    global generator. (A product with int8 is twice as fast as one with bool, thrice as `where`.)
    """
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None)
    first = threshold - LEVELS // 2  # the lowest draw that stays
    # Two vector instructions; a comparison, whose result has one byte less, has none.
    stays = words.view(torch.int16)[:count].clamp_(first - 1, first).sub_(first - 1)
    return stays.to(torch.int8).view(shape)


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)


def _cheap(x: Tensor, threshold: int) -> bool:
    eager = x.device.type == "cpu" and is_eager()
    return eager and x.numel() > 0 and 0 < threshold < LEVELS


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        ctx.scale = LEVELS / (LEVELS - threshold)
        hidden = F.relu(x).mul_(dropout_mask(x.shape, threshold)).mul_(ctx.scale)
        ctx.save_for_backward(hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        masked: Tensor = torch.ops.aten.threshold_backward(grad, hidden, 0)
        return masked * ctx.scale, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        mask = dropout_mask(x.shape, threshold)
        ctx.save_for_backward(mask)
        ctx.scale = LEVELS / (LEVELS - threshold)
        return (x * mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (grad * mask).mul_(ctx.scale), None
