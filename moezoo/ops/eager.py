"""Where an operator's gradient may be written by hand, and the host may look at a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moezoo.private_torch import (
    are_tangents_on,
    is_batched_by_autograd,
    is_batched_by_vmap,
    is_differentiated_forward,
    is_traced_by_jit,
    is_within_func,
    tangents,
)


def is_eager() -> bool:
    """Whether operators run at once, on plain tensors: neither traced by `torch.compile`,
    `torch.export` and `torch.jit.trace` nor transformed by `torch.func` or differentiated forward,
    which see through operators of torch alone.
    """
    if torch.compiler.is_compiling() or is_differentiated_forward():
        return False
    return not is_traced_by_jit() and not is_within_func()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for operators on x: never on "meta", of which torch says so by
    raising.
    """
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def is_followed(grad: Tensor) -> bool:
    """Whether the gradient that is computed now must be of plain operators: somebody
    differentiates it again, or computes many at once (`is_grads_batched`).
    """
    if torch.is_grad_enabled() or is_batched_by_autograd(grad):
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
    return tangents(True)


def without_tangent(x: Tensor) -> Tensor:
    """x, constant at the innermost level of forward-mode differentiation."""
    primal: Tensor = forward_ad.unpack_dual(x).primal  # type: ignore[no-untyped-call]
    return primal


def is_recorded() -> bool:
    """Whether `torch.jit.trace` writes down which operators run."""
    return not torch.compiler.is_compiling() and is_traced_by_jit()


def is_batched(x: Tensor | None) -> bool:
    """Whether `torch.vmap` holds many tensors in the place of this one."""
    return x is not None and is_batched_by_vmap(x)


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, such as `grad`, or a forward-mode differentiation is
    active outside tracing.
    """
    if torch.compiler.is_compiling():
        return False
    return is_within_func() or (is_differentiated_forward() and are_tangents_on())
