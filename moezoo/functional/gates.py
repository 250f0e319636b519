"""Gates: scores of experts, always computed in float32 or better (selective precision, section
2.4).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from moezoo.errors import ConfigError
from moezoo.functional.drawn import DrawnLinear
from moezoo.ops.eager import autocasts, is_eager
from moezoo.ops.memory import in_huge_pages, large_empty
from moezoo.ops.observed import is_plain, is_plain_tensor
from moezoo.ops.products import fast_products, steady_product
from moezoo.private_torch import softmax_gradient

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 when the input is float64."""
    return torch.promote_types(dtype, torch.float32)


def is_plain_gate(module: nn.Module) -> bool:
    """Whether a gate is a linear map that nobody observes, nor has quantised: its weights may be
    read.
    """
    plain = is_plain(module, nn.Linear, DrawnLinear)
    return plain and is_plain_tensor(cast(Tensor, module.weight))


def gate(module: nn.Module, x_TD: Tensor) -> Tensor:
    """Scores (T, E) that a linear gate, as a module, gives tokens (T, D): `gate_logits`.

    A gate that somebody wraps, hooks, patches or parametrises is called, on tokens in gate
    precision and with its floating parameters and buffers in the same while it runs.

    Raises ConfigError for half-precision weights that are on "meta" until they are called for.
    """
    if is_plain_gate(module):
        return gate_logits(x_TD, module.weight, module.bias)  # type: ignore[arg-type]
    dtype = gate_dtype(x_TD.dtype)
    named = (*module.named_parameters(), *module.named_buffers())
    narrow = {name: t for name, t in named if t.dtype in _FLOATING and t.dtype != dtype}
    if any(tensor.is_meta for tensor in narrow.values()) and not x_TD.is_meta:
        hint = "Keep routers on the device, or in float32."
        reason = f"a {type(module).__name__} in half precision is offloaded, gates run in {dtype}"
        raise ConfigError(reason, field="gate", hint=hint)
    with outside_autocast(x_TD):
        if not narrow:
            return module(x_TD.to(dtype)).to(dtype)  # type: ignore[no-any-return]
        wide = {name: tensor.to(dtype) for name, tensor in narrow.items()}
        return functional_call(module, wide, (x_TD.to(dtype),)).to(dtype)  # type: ignore[no-any-return]


def gate_weight(module: nn.Module, like_TD: Tensor) -> Tensor:
    """The matrix (E, D) of a linear gate that is not applied to tokens, in gate precision: what it
    makes of unit vectors, when it must be called.
    """
    if is_plain_gate(module):
        return cast(Tensor, module.weight).to(gate_dtype(like_TD.dtype))
    return gate(module, torch.eye(like_TD.shape[1], dtype=like_TD.dtype, device=like_TD.device)).t()


def gate_logits(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Expert scores (T, E) of tokens (T, D) for a classifier (E, D) [+ (E,)].

    Switch Transformers, eq. 1 before the softmax. Autocast is switched off around the product:
    under it, a float32 gate would silently run in bfloat16.
    """
    if autocasts(x_TD):
        with outside_autocast(x_TD):
            return _gate_logits(x_TD, weight, bias)
    return _gate_logits(x_TD, weight, bias)


def outside_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Where operators on x keep its dtype."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _gate_logits(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = gate_dtype(x_TD.dtype)
    x_TD, weight = x_TD.to(dtype), weight.to(dtype)
    if not fast_products(x_TD, weight):
        return F.linear(x_TD, weight, None if bias is None else bias.to(dtype))
    # One product with and without a gradient: a recomputation routes as the first run did.
    if torch.is_grad_enabled():
        logits_TE: Tensor = _Product.apply(x_TD, weight)  # type: ignore[no-untyped-call]
    else:
        logits_TE = steady_product(x_TD, weight)
    return logits_TE if bias is None else logits_TE + bias.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T, a token's scores with the same bits alone and in a batch."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        return steady_product(x_TD, weight)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight = ctx.saved_tensors
        grad_x = grad_TE @ weight if ctx.needs_input_grad[0] else None
        return grad_x, grad_TE.t() @ x_TD if ctx.needs_input_grad[1] else None


def gate_probs(logits_TE: Tensor) -> Tensor:
    """Expert probabilities (T, E), the softmax of eq. 1; large ones in huge pages."""
    size = logits_TE.numel() * logits_TE.element_size()
    if not is_eager() or not in_huge_pages(size, logits_TE.device):
        return logits_TE.softmax(dim=-1)
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        probs_TE: Tensor = _Softmax.apply(logits_TE)  # type: ignore[no-untyped-call]
        return probs_TE
    return _softmax(logits_TE)


def _softmax(logits_TE: Tensor) -> Tensor:
    out_TE = large_empty(logits_TE.shape, logits_TE.dtype)
    return torch.softmax(logits_TE, -1, out=out_TE)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor) -> Tensor:
        probs_TE = _softmax(logits_TE)
        ctx.save_for_backward(probs_TE)
        return probs_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> Tensor:
        (probs_TE,) = ctx.saved_tensors
        return softmax_gradient(grad_TE, probs_TE)


def jittered(x_TD: Tensor, epsilon: float) -> Tensor:
    """A copy of x in gate precision, each entry times U(1 - epsilon, 1 + epsilon) (section 2.4).

    The multiplication is on the router's input; the experts never see it.
    """
    x_TD = x_TD.to(gate_dtype(x_TD.dtype))
    return x_TD * torch.empty_like(x_TD).uniform_(1.0 - epsilon, 1.0 + epsilon)
