"""Who looks in: whether a module may be passed by, its weights read and its work done otherwise."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor, nn

from moezoo.private_torch import is_compiled_in_place, is_hooked, is_made_by_compile

_CALL = nn.Module.__call__
_CLASSES: dict[type, tuple[frozenset[str], object]] = {}  # names of functions; a sound `forward`


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of `kinds`, and nobody observes it.

    A wrapper, a subclass and a parametrised module are of another class, whatever `isinstance`
    says: they compute what they like.
    """
    return type(module) in kinds and not is_observed(module)


def is_observed(module: nn.Module, *methods: str, whole: bool = False) -> bool:
    """Whether somebody would miss a call of this module: it has a hook of any kind, or all modules
    have; `forward`, or one of `methods`, is hidden by the instance (with `whole`: any function is)
    or not what the class was written with; it is compiled. While `torch.compile` traces, always.
    """
    if torch.compiler.is_compiling() or is_hooked(module):
        return True
    own, kind = vars(module), type(module)
    if kind.__call__ is not _CALL:
        return True
    functions, forward = _CLASSES.get(kind) or _read(kind)
    if forward is not kind.forward or "forward" in own:
        return True
    if whole and not functions.isdisjoint(own):
        return True
    return any(name in own or not _is_as_written(kind, name) for name in methods)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether a tensor holds the values that its dtype says, and no class of its own decides what
    operators do with them (quantised, sharded and fake ones).
    """
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled in place, or is what `torch.compile` made of another."""
    return is_made_by_compile(module) or is_compiled_in_place(module)


def _read(kind: type[nn.Module]) -> tuple[frozenset[str], object]:
    """The names of a class's functions, and its `forward` if that is as written."""
    spaces = [vars(base) for base in kind.__mro__ if base is not object]
    names = frozenset(name for space in spaces for name, value in space.items() if callable(value))
    if not _is_as_written(kind, "forward"):
        return names, None  # and look again: it may be put back
    _CLASSES[kind] = names, kind.forward
    return _CLASSES[kind]


def _is_as_written(kind: type[nn.Module], name: str) -> bool:
    """Whether a method is a function from the body of the class, by where its code stands:
    `functools.wraps` copies names, not code.
    """
    method = getattr(kind, name)
    if method is nn.Module.forward:  # of a container, which nobody calls
        return True
    if not isinstance(method, FunctionType):
        return False
    home = method.__globals__.get("__name__")
    names = [f"{base.__qualname__}.{name}" for base in kind.__mro__ if base.__module__ == home]
    return method.__code__.co_qualname in names
