"""Ways to look in on a module, each of which changes what a call of it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook


class Coded(Tensor):
    """A weight of eight bits as other tools put it in the place of a parameter's data: it has a
    floating dtype, and knows `F.linear` alone.
    """

    @staticmethod
    def __new__(cls, weight: Tensor) -> Coded:
        made: Coded = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        return made

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127.0
        self.rounded = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.rounded * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a coded weight knows no {func}")


def code(layer: nn.Linear) -> None:
    """Give a linear layer a coded weight."""
    layer.weight = nn.Parameter(Coded(layer.weight.detach()), requires_grad=False)


Change = Callable[[Any, Any], Any]


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


@contextmanager
def hook(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, inputs, output: change(inputs, output))
    yield
    handle.remove()


@contextmanager
def global_hook(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    target = model.get_submodule(name)

    def seen(module: nn.Module, inputs: Any, output: Any) -> Any:
        return change(inputs, output) if module is target else None

    handle = register_module_forward_hook(seen)
    yield
    handle.remove()


@contextmanager
def patched_instance(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    module = model.get_submodule(name)
    before = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        return change(inputs, before(*inputs, **named))

    module.forward = forward  # type: ignore[method-assign]
    yield
    del module.__dict__["forward"]


@contextmanager
def patched_class(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    target = model.get_submodule(name)
    kind = type(target)
    own, before = "forward" in vars(kind), kind.forward

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        output = before(self, *inputs, **named)
        return change(inputs, output) if self is target else output

    forward.__qualname__, forward.__module__ = before.__qualname__, before.__module__  # `wraps`
    kind.forward = forward  # type: ignore[method-assign]
    yield
    if own:
        kind.forward = before  # type: ignore[method-assign]
    else:
        del kind.forward


@contextmanager
def subclass(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    module = model.get_submodule(name)
    kind = type(module)

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        return change(inputs, kind.forward(self, *inputs, **named))

    module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward})
    yield
    module.__class__ = kind


class Wrapper(nn.Module):
    """What tools put in the place of a module; attributes are those of the module."""

    def __init__(self, module: nn.Module, change: Change) -> None:
        super().__init__()
        self.wrapped, self.change = module, change

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.change(inputs, self.wrapped(*inputs, **named))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


@contextmanager
def wrapper(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    owner, leaf = parent_of(model, name)
    module = model.get_submodule(name)
    setattr(owner, leaf, Wrapper(module, change))
    yield
    setattr(owner, leaf, module)


@contextmanager
def compiled(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    owner, leaf = parent_of(model, name)
    module = model.get_submodule(name)
    setattr(owner, leaf, torch.compile(Wrapper(module, change), backend="eager", dynamic=True))
    yield
    setattr(owner, leaf, module)


QUICK = {
    "hook": hook,
    "global hook": global_hook,
    "patched instance": patched_instance,
    "patched class": patched_class,
    "subclass": subclass,
    "wrapper": wrapper,
}
ALL = {**QUICK, "compiled": compiled}
