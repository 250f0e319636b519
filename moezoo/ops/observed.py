"""Who looks in: whether a module may be passed by, its weights read and its work done otherwise."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_CALL = nn.Module.__call__
_FORWARD, _BEFORE = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
_BACKWARD = torch_module._global_backward_hooks
_BEFORE_BACKWARD = torch_module._global_backward_pre_hooks
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
    if torch.compiler.is_compiling():
        return True
    own, kind = vars(module), type(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return True
    if own["_backward_hooks"] or own["_backward_pre_hooks"] or _FORWARD or _BEFORE:
        return True
    if _BACKWARD or _BEFORE_BACKWARD:
        return True
    if kind.__call__ is not _CALL or "_compiled_call_impl" in own:
        return True
    functions, forward = _CLASSES.get(kind) or _read(kind)
    if forward is not kind.forward or "forward" in own:
        return True
    if whole and not functions.isdisjoint(own):
        return True
    return any(name in own or not _is_as_written(kind, name) for name in methods)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled in place, or is what `torch.compile` made of another."""
    # The class by its home: to import it is to import the compiler.
    of_compiler = type(module).__module__ == "torch._dynamo.eval_frame"
    return of_compiler or "_compiled_call_impl" in vars(module)


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
