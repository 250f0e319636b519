"""Attention with dropout on its weights, in training, without a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moezoo.functional.dropout import LEVELS, dropout, dropout_mask
from moezoo.ops.eager import is_followed, plain_gradients
from moezoo.private_torch import softmax_gradient

_SCORES_AT_ONCE = 2**19  # 2 MiB of float32


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, p: float
) -> Tensor:
    """dropout(softmax(q k^T + bias)) v for (B, H, L, dk) and an additive bias that broadcasts.

    On a CPU torch has no fused kernel for this; its composite keeps the weights, the mask and the
    dropped weights for backward, 9 bytes per pair. Here the sign of a weight says whether it was
    dropped: 4 bytes; every step but the products works in place, on as many sequences at a time
    as the cache holds, and no head is copied for a product. Reduced
    precision takes the composite, whose softmax is in float32.
    """
    wide = query.dtype in (torch.float32, torch.float64)
    threshold = round(p * LEVELS)
    if not wide or torch.is_autocast_enabled("cpu") or not 0 < threshold < LEVELS:
        return composed_attention(query, key, value, bias, partial(dropout, p=p, training=True))
    out: Tensor = _DroppedAttention.apply(query, key, value, bias, threshold)  # type: ignore[no-untyped-call]
    return out


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """drop(softmax(q k^T + bias)) v, of operators that autograd and every transform follow, as they
    do not the fused ones.
    """
    scores = query @ key.transpose(2, 3)
    scores = scores if bias is None else scores + bias
    return drop(scores.softmax(-1)).to(value.dtype) @ value


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, threshold: int
    ) -> Tensor:
        signed = query.new_empty(*query.shape[:3], key.shape[2])
        out = _heads_last(value, query.shape[2])
        for part in _parts(signed):
            scores = signed[part]
            torch.bmm(_flat(query[part]), _flat(key[part]).mT, out=_flat(scores))
            if bias is not None:
                scores.add_(_part_of(bias, part))
            torch.softmax(scores, -1, out=scores)
            scores.mul_(dropout_mask(scores.shape, threshold).mul_(2).sub_(1))
            mixed = torch.bmm(_flat(scores.clamp(min=0)), _flat(value[part]))
            _fill(out[part], mixed)
        ctx.scale = LEVELS / (LEVELS - threshold)
        ctx.save_for_backward(query, key, value, bias, signed)
        return out.mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, all_signed = ctx.saved_tensors
        if is_followed(grad):
            return _composed_backward(ctx, grad)
        grad = grad * ctx.scale
        grads = [_heads_last(tensor, tensor.shape[2]) for tensor in (query, key, value)]
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for part in _parts(all_signed):
            signed, grad_part = all_signed[part], _flat(grad[part])
            weights = signed.clamp(min=0)
            _fill(grads[2][part], _flat(weights).mT @ grad_part)
            scores = torch.bmm(grad_part, _flat(value[part]).mT).view(signed.shape)
            # In place from here on: the gradient of the dropped weights, of all, of the scores.
            torch.ops.aten.threshold_backward.grad_input(scores, signed, 0, grad_input=scores)
            torch.abs(signed, out=weights)
            softmax_gradient(scores, weights, out=scores)
            _fill(grads[0][part], torch.bmm(_flat(scores), _flat(key[part])))
            _fill(grads[1][part], torch.bmm(_flat(scores).mT, _flat(query[part])))
            if grad_bias is not None:
                target = _part_of(grad_bias, part)
                target.add_(scores.sum_to_size(target.shape))
        return *grads, grad_bias, None


def _composed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as a function that autograd can follow, with the same weights dropped."""
    query, key, value, bias, signed = ctx.saved_tensors
    mask = (signed > 0).to(signed.dtype) * ctx.scale
    inputs = (query, key, value) if bias is None else (query, key, value, bias)

    def made(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return composed_attention(query, key, value, bias, partial(torch.mul, mask))

    found = plain_gradients(made, inputs, grad, ctx.needs_input_grad[: len(inputs)])
    return (*found, None) if bias is not None else (*found, None, None)


Part = tuple[slice, slice]


def _parts(scores: Tensor) -> Iterator[Part]:
    """As many sequences as fit into the cache with their scores, or heads of one; one at least."""
    batch, heads = scores.shape[:2]
    fitting = max(_SCORES_AT_ONCE // max(scores[:1, :1].numel(), 1), 1)
    rows, some = max(fitting // max(heads, 1), 1), min(fitting, max(heads, 1))
    for row in range(0, batch, rows):
        for head in range(0, heads, some):
            yield slice(row, row + rows), slice(head, head + some)


def _part_of(bias: Tensor, part: Part) -> Tensor:
    """That of a bias (1 or B, 1 or H, ...)."""
    whole = slice(None)
    rows, heads = (whole if n == 1 else s for n, s in zip(bias.shape[:2], part, strict=True))
    return bias[rows, heads]


def _flat(x_BHLD: Tensor) -> Tensor:
    """(B * H, L, D): a view of one sequence in any layout, else a copy if need be."""
    return x_BHLD.flatten(0, 1)


def _fill(target_BHLD: Tensor, flat: Tensor) -> None:
    target_BHLD.copy_(flat.view(target_BHLD.shape))


def _heads_last(like_BHLD: Tensor, length: int) -> Tensor:
    """An empty (B, H, length, D) that is (B, length, H, D) in memory, as the linear maps around
    attention want it.
    """
    batch, heads, _, width = like_BHLD.shape
    return like_BHLD.new_empty(batch, length, heads, width).transpose(1, 2)
