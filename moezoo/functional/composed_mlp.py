"""E feed-forward networks over rows sorted by expert, of operators that everyone sees through:
`torch.compile`, `torch.export`, and autograd when it differentiates a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.functional.activations import Activation
from moezoo.functional.dropout import dropout, relu_dropout
from moezoo.ops.eager import plain_gradients
from moezoo.ops.grouped_linear import grouped_linear, rows_of


def composed_mlp(
    x: Tensor,
    counts: Tensor,
    weights: Sequence[Tensor],
    function: Activation,
    drop: float | Callable[[Tensor], Tensor],
    gate_N: Tensor | None = None,
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """`grouped_mlp` composed of `grouped_linear`; drop: p, or what is done to the hidden units
    (N, F) in the place of dropout.

    gate_N: (N,), a factor of each row, on the hidden units: what comes after is linear, and no
    result without it is ever rounded to the dtype. biases: none, or one for each of weights.
    """
    *inner, outer = weights
    *inner_biases, outer_bias = biases or (None,) * len(weights)
    first = grouped_linear(x, inner[0], counts, bias=inner_biases[0])
    if not callable(drop) and len(inner) == 1 and function is F.relu:
        hidden = relu_dropout(first, drop, training=True)
    else:
        hidden = function(first)
        for weight, bias in zip(inner[1:], inner_biases[1:], strict=True):
            hidden = hidden * grouped_linear(x, weight, counts, bias=bias)
        hidden = drop(hidden) if callable(drop) else dropout(hidden, drop, training=True)
    if gate_N is None:
        return grouped_linear(hidden, outer, counts, bias=outer_bias)
    gate_N1 = gate_N[:, None].to(hidden.dtype)
    out = grouped_linear(hidden * gate_N1, outer, counts)
    if outer_bias is None:
        return out
    return out + gate_N1.to(out.dtype) * rows_of(outer_bias.to(out.dtype), counts, x.shape[0])


def composed_gradients(
    x: Tensor,
    counts: Tensor,
    weights: Sequence[Tensor],
    function: Activation,
    mask: Tensor | None,
    grad: Tensor,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `composed_mlp` for x and the weights that are wanted, as a function that
    autograd can follow.
    """
    drop = 0.0 if mask is None else partial(torch.mul, mask)

    def made(x: Tensor, *weights: Tensor) -> Tensor:
        return composed_mlp(x, counts, weights, function, drop)

    return plain_gradients(made, (x, *weights), grad, wants)
