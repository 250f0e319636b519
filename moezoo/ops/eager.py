"""Where an operator's gradient may be written by hand, and the host may look at a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_eager() -> bool:
    """Whether operators run at once, on plain tensors: neither traced by `torch.compile`,
    `torch.export` and `torch.jit.trace` nor transformed by `torch.func` or differentiated forward,
    which see through operators of torch alone.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    return torch._C._get_tracing_state() is None and not is_transformed()


def is_followed(grad: Tensor) -> bool:
    """Whether the gradient that is computed now must be of plain operators: somebody
    differentiates it again, or computes many at once (`is_grads_batched`).
    """
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
        return True
    return not is_eager()


def plain_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)` for the inputs that are wanted, of the operators that
    it is made of: what backward returns where `is_followed`.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: an input may have been computed with another one, and that way is not ours.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        chosen = [alias for alias, want in zip(aliases, wants, strict=True) if want]
        out = function(*aliases)
        found = iter(torch.autograd.grad(out, chosen, grads, create_graph=again))
    return [next(found) if want else None for want in wants]


def tangents_followed() -> AbstractContextManager[object]:
    """Within an operator's `jvp`, where torch switches them off: tangents of tangents count too."""
    context: AbstractContextManager[object] = forward_ad._set_fwd_grad_enabled(True)
    return context


def without_tangent(x: Tensor) -> Tensor:
    """x, constant at the innermost level of forward-mode differentiation."""
    primal: Tensor = forward_ad.unpack_dual(x).primal  # type: ignore[no-untyped-call]
    return primal


def is_recorded() -> bool:
    """Whether `torch.jit.trace` writes down which operators run."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_batched(x: Tensor | None) -> bool:
    """Whether `torch.vmap` holds many tensors in the place of this one."""
    while x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, such as `grad`, or a forward-mode differentiation is
    active outside tracing.
    """
    if torch.compiler.is_compiling():
        return False
    active: bool = torch._C._are_functorch_transforms_active()
    return active or (forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled())
