"""E linear maps over rows sorted by expert, as an operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo.ops.backends import choose
from moezoo.ops.eager import autocasts, is_transformed, tangents_followed, without_tangent


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Row r of expert e times weight[e]^T [+ bias[e]].

    `torch.compile` and `torch.export` see one operator with a fixed output shape; the counts are
    read inside it. Twice differentiable. Under autocast it computes in autocast's dtype, as
    `F.linear` does, and casts only the weights of experts that have rows.

    Args:
        x: (N, K), rows sorted by expert. weight: (E, M, K). counts: (E,) int64. bias: (E, M).
        backend: "auto", or one of `moezoo.ops.backends.BACKENDS`.

    Returns:
        (N, M), zero in rows past counts.sum().

    Raises ConfigError for an unknown backend, or one that cannot take these tensors.
    """
    if x.dtype != torch.float64 and autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out = _product(_linear, x, weight, counts, backend)
    return out if bias is None else out + rows_of(bias.to(out.dtype), counts, x.shape[0])


def rows_of(bias: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """(E, M) -> (N, M): its expert's bias in each row, zero past the counts."""
    place_N = torch.arange(num_rows, device=counts.device)
    expert_N = torch.searchsorted(counts.cumsum(0), place_N, right=True)
    return torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).index_select(0, expert_N)


@torch.library.custom_op(
    "moezoo::grouped_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor counts, str backend) -> Tensor",
)
def _linear(x: Tensor, weight: Tensor, counts: Tensor, backend: str) -> Tensor:
    return choose(backend, x, weight, counts).linear(x, weight, counts)


@torch.library.custom_op(
    "moezoo::grouped_outer",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor counts, str backend) -> Tensor",
)
def _outer(a: Tensor, b: Tensor, counts: Tensor, backend: str) -> Tensor:
    return choose(backend, a, b, counts).outer(a, b, counts)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(a: Tensor, b: Tensor, counts: Tensor, backend: str) -> Tensor:
    return a.new_empty(counts.shape[0], a.shape[1], b.shape[1])


def _product(operator: Any, first: Tensor, second: Tensor, counts: Tensor, backend: str) -> Tensor:
    if is_transformed():
        transformed: Tensor = _Transformed.apply(operator, first, second, counts, backend)  # type: ignore[no-untyped-call]
        return transformed
    out: Tensor = operator(first, second, counts, backend)
    return out


class _Transformed(torch.autograd.Function):
    """An operator for `torch.func` and forward-mode differentiation, which do not see through
    custom ones by themselves; it is linear in each of its two factors.
    """

    @staticmethod
    def forward(
        operator: Any, first: Tensor, second: Tensor, counts: Tensor, backend: str
    ) -> Tensor:
        return _product(operator, first, second, counts, backend)  # of the transform around it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator, *others = inputs
        _keep(ctx, tuple(others), output)
        ctx.save_for_forward(*others[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = _linear_backward if ctx.operator is _linear else _outer_backward
        return None, *backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, first: Tensor, second: Tensor, *__: None) -> Tensor:
        with tangents_followed():
            one, other, counts = map(without_tangent, ctx.saved_for_forward)
            left = _product(ctx.operator, first, other, counts, ctx.backend)
            return left + _product(ctx.operator, one, second, counts, ctx.backend)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], operator: Any, *inputs: Any
    ) -> tuple[Tensor, int]:
        *tensors, backend = inputs
        parts = [
            [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
            for tensor, dim in zip(tensors, dims[1:-1], strict=True)
        ]
        each = [
            _product(operator, first, second, counts, backend)
            for first, second, counts in zip(*parts, strict=True)
        ]
        return torch.stack(each), 0


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, counts, ctx.backend = inputs
    ctx.save_for_backward(first, second, counts)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    grad_x = grad_w = None
    wants_x, wants_w = ctx.needs_input_grad[-4:-2]
    if wants_x:
        grad_x = _product(_linear, grad, weight.transpose(1, 2), counts, ctx.backend)
    if wants_w:
        grad_w = _product(_outer, grad, x, counts, ctx.backend).to(weight.dtype)
    return grad_x, grad_w, None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, counts = ctx.saved_tensors
    grad_a = grad_b = None
    wants_a, wants_b = ctx.needs_input_grad[-4:-2]
    if wants_a:
        grad_a = _product(_linear, b, grad, counts, ctx.backend)
    if wants_b:
        grad_b = _product(_linear, a, grad.transpose(1, 2), counts, ctx.backend)
    return grad_a, grad_b, None, None


_linear.register_autograd(_linear_backward, setup_context=_keep)
_outer.register_autograd(_outer_backward, setup_context=_keep)
