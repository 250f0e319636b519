"""What every module with state of its own is: its buffers keep their steps, and it can be drawn
anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.errors import ConfigError


class Component(nn.Module):
    """A module whose own buffers are never half precision and whose state has one home.

    A balancing bias moves by 0.001 and a loss coefficient starts at 1e-8: bfloat16 and float16 lose
    both. So a floating buffer is float32 at least, and an integer one keeps its type, whatever the
    dtype of the model: when it is registered, assigned (as by `load_state_dict(assign=True)`), or
    cast with the model. `widen_buffers` does the same for buffers that were changed behind the
    module's back, as FSDP's `buffer_dtype` does.

    `reset_own` is the one home of the initial values of its own parameters and buffers; the
    constructor calls it, and after `to_empty` so does `reset_parameters`.
    """

    def reset_parameters(self) -> None:
        """Give everything in and below this module its initial value.

        With the same random numbers these are the constructor's, bit for bit. Raises ConfigError
        for a module that has tensors and no method for it.
        """
        for child in self.children():
            redraw(child)
        self.reset_own()

    def reset_own(self) -> None:
        """Give this module's own parameters and buffers their initial values; a subclass that has
        any says how.
        """
        if owns_tensors(self):
            raise _no_home(self, "reset_own")

    def widen_buffers(self) -> None:
        """Make half-precision buffers float32."""
        for name, buffer in _own_buffers(self).items():
            if _is_half(buffer):
                setattr(self, name, buffer.float())

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in torch, which assigns to a buffer by this method too."""
        before = _own_buffers(self).get(name)
        if tensor is not None and before is not None and not before.is_floating_point():
            tensor = tensor.to(before.dtype)
        elif tensor is not None and _is_half(tensor):
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Component:
        # Private to torch, but what every cast and move calls; there is no public place for this.
        before = _own_buffers(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in _own_buffers(self).items():
            if _is_half(buffer):  # from the value before it was rounded
                setattr(self, name, before[name].to(buffer.device, torch.float32))
        return self


def redraw(module: nn.Module) -> None:
    """Give everything in and below a module its initial value, children first, as constructors do.

    Raises ConfigError for a module that has tensors and no `reset_parameters`.
    """
    if not isinstance(module, Component):  # which sees to its children itself
        for child in module.children():
            redraw(child)
    reset: Any = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    elif owns_tensors(module):
        raise _no_home(module, "reset_parameters")


def owns_tensors(module: nn.Module) -> bool:
    """Whether a module itself, without its children, has a parameter or buffer."""
    return bool(_own_tensors(module))


def _own_buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **_own_buffers(module)}


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _no_home(module: nn.Module, method: str) -> ConfigError:
    first = next(iter(_own_tensors(module)))
    return ConfigError(
        f"{type(module).__name__} cannot be drawn: nothing says how {first!r} starts",
        field=first,
        hint=f"Set its parameters and buffers in a method {method}(self).",
    )
