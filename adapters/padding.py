"""A plugged model's own mask, brought to its sparse layers: padding is not routed."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from moezoo.errors import ConfigError, ShapeError
from moezoo.private_torch import is_in_backward
from moezoo.sparse_mlp import SparseMLP

Mask = str | Callable[[Mapping[str, Any]], Tensor | None] | bool | None

_OF_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask")
_OF_TOKENS = ("attention_mask",)
_UNCLEAR = ("mask", "attn_mask", "input_mask")
_TWO_SEQUENCES = ("decoder_attention_mask", "decoder_input_ids", "tgt")
_CACHES = ("past_key_values", "past_key_value", "cache")
Held = tuple[Tensor | None, bool]  # the mask, and whether there is a cache


def carriers_of(model: nn.Module, layers: Sequence[str], mask: Mask = None) -> dict[str, Padding]:
    """What brings the mask that a model is called with to the sparse layers inside the modules
    `layers`, by the name of the module that is called with it; `Padding.attach` starts each.

    Args:
        mask: the name of an argument of `model.forward`, or a function of its arguments by name
            that gives (B, L), True for real tokens; None: an argument whose name says what it is
            (`attention_mask`, `src_key_padding_mask`, ...), of the outermost module around a layer
            that has one for one sequence; False: none.

    Raises ConfigError for a name that there is not, and for a model whose argument "mask" may be
    either kind.
    """
    if not (mask is None or mask is False or isinstance(mask, str) or callable(mask)):
        wanted = "the name of an argument, a function of all of them, False or None"
        raise ConfigError("cannot find a mask with this", field="mask", expected=wanted, found=mask)
    carriers: dict[str, Padding] = {}
    for layer in layers if mask is not False else ():
        found = _owner(model, layer, mask)
        if found is not None:
            owner, argument = found
            carriers.setdefault(owner, Padding(argument)).layers.append(layer)
    return carriers


def _owner(model: nn.Module, layer: str, mask: Mask) -> tuple[str, Any] | None:
    """The module whose call holds the mask for a layer, and the argument."""
    if callable(mask):
        return "", mask
    if isinstance(mask, str):
        if mask not in parameters_of(model):
            found = ", ".join(parameters_of(model))
            reason = f"{type(model).__name__}.forward has no argument {mask!r}"
            raise ConfigError(reason, field="mask", found=found)
        return "", mask
    for depth, (around, module) in enumerate(modules_around(model, layer)):
        names = parameters_of(module)
        both = {"src_key_padding_mask", "tgt_key_padding_mask"} <= set(names)
        if both or any(name in names[1:] for name in _TWO_SEQUENCES):
            continue  # the stacks inside have one each
        argument = next((name for name in (*_OF_PADDING, *_OF_TOKENS) if name in names), None)
        if argument is not None:
            return around, argument
        unclear = next((name for name in _UNCLEAR if name in names), None)
        if not depth and unclear is not None:
            hint = f"Pass mask={unclear!r} if 1 is a real token, a function, or mask=False."
            reason = (
                f"{type(model).__name__}.forward takes {unclear!r}, which may be of either kind"
            )
            raise ConfigError(reason, field="mask", hint=hint)
    return None


def modules_around(model: nn.Module, layer: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules around a layer by name, outermost first; without PEFT's wrapper, whose `generate`
    calls the model inside.
    """
    parts = layer.split(".")
    for depth in range(len(parts)):
        name = ".".join(parts[:depth])
        module = model.get_submodule(name)
        if not hasattr(type(module), "get_base_model"):
            yield name, module


def parameters_of(module: nn.Module) -> list[str]:
    """The names of what a module is called with."""
    return list(inspect.signature(module.forward).parameters)


class Padding:
    """Holds, while a module runs, the mask it was called with; one value per thread.

    What is recomputed inside backward runs without the module around it: what blocks were called
    with then tells the mask. Their hooks may run outside of what is recomputed (transformers 5.23),
    so the modules in a block look at their inputs, too.
    """

    def __init__(self, argument: Any) -> None:
        self.argument = argument
        self.names: list[str] = []
        self.layers: list[str] = []
        self.masked = False
        self._forget()

    def _forget(self) -> None:
        self.held: dict[int, list[Held]] = {}
        self.marks: Any = WeakTensorKeyDictionary()  # of inputs: what was held, by block
        self.recalled: dict[int, dict[nn.Module, Held]] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = ("argument", "names", "layers", "masked")
        return {name: vars(self)[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def attach(self, model: nn.Module, owner: str) -> None:
        """Take the mask of each call of the module `owner`; give it to the sparse layers."""
        called = model.get_submodule(owner)
        self.names = parameters_of(called)
        called.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        called.register_forward_hook(self._leave, always_call=True)
        start = len(owner.split(".")) if owner else 0
        between: dict[nn.Module, None] = {}
        served: dict[nn.Module, None] = {}
        for name in self.layers:
            parts = name.split(".")
            for depth in range(start + 1, len(parts) + 1):
                between[model.get_submodule(".".join(parts[:depth]))] = None
            served |= dict.fromkeys(model.get_submodule(name).modules())
        blocks = [block for block in between if not isinstance(block, SparseMLP)]
        inside = dict.fromkeys(part for block in blocks for part in block.children())
        for block in blocks:
            block.register_forward_pre_hook(self._resume, with_kwargs=True, prepend=True)
            block.register_forward_hook(self._pause, always_call=True)
        for part in [part for part in inside if part not in between]:
            part.register_forward_pre_hook(self._recall, with_kwargs=True)
        for layer in served:
            if isinstance(layer, SparseMLP):
                layer.register_forward_pre_hook(self._give, with_kwargs=True)

    def _stack(self) -> list[Held]:
        return self.held.setdefault(0 if is_compiling() else threading.get_ident(), [])

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cached = cache_of(given) is not None
        if callable(self.argument):
            mask = self.argument(given)
        else:
            mask = real_of(given.get(self.argument), self.argument, cache_of(given))
        self.masked = self.masked or mask is not None
        self.recalled.clear()  # of an earlier backward
        self._stack().append((mask, cached))

    def _leave(self, *_: object) -> None:
        stack = self._stack()
        if stack:
            stack.pop()
        if not stack:
            self.held.pop(0 if is_compiling() else threading.get_ident(), None)

    def _resume(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark what a block is called with, or, when it is recomputed, hold what it had."""
        stack = self._stack()
        held = self._of(module, args, kwargs)
        if not stack and held is not None:
            stack.append(held)
            module.__dict__["_moezoo_resumed"] = True

    def _pause(self, module: nn.Module, *_: object) -> None:
        if module.__dict__.pop("_moezoo_resumed", False):
            self._leave()

    def _of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Held | None:
        """What is held for a module that is called. Raises ConfigError where it is recomputed and
        nothing tells what it had.
        """
        stack = self._stack()
        if is_compiling() or not (stack or (self.masked and is_in_backward())):
            return stack[-1] if stack else None
        if not is_in_backward():
            first = next(iter(_tensors(args, kwargs)), None)
            if first is not None and torch.is_grad_enabled():
                self.marks.setdefault(first, {})[module] = stack[-1]
        if stack:
            return stack[-1]
        self._recall(module, args, kwargs)
        for block, held in self.recalled.get(threading.get_ident(), {}).items():
            if any(part is module for part in block.modules()):
                return held
        hint = "Pass use_reentrant=False to activation checkpointing."
        kind = type(module).__name__
        raise ConfigError(f"{kind} is recomputed without its mask", field="mask", hint=hint)

    def _recall(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find what was held when a block that is recomputed now was called with these inputs."""
        if is_compiling() or self._stack() or not is_in_backward():
            return
        for tensor in _tensors(args, kwargs):
            if tensor in self.marks:
                self.recalled[threading.get_ident()] = self.marks[tensor]
                return

    def _give(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        held = None if kwargs.get("mask") is not None else self._of(layer, args, kwargs)
        if held is None or held[0] is None:
            return None
        mask, cached = held
        assert mask is not None and isinstance(layer, SparseMLP)
        x = args[0] if args else kwargs["x"]
        wanted = x.shape[:-1] if layer.batch_first or x.dim() != 3 else x.shape[1::-1]
        flat = x.dim() == 2 and mask.dim() == 2 and x.shape[0] % max(mask.shape[0], 1) == 0
        length = x.shape[0] // max(mask.shape[0], 1) if flat else wanted[-1]
        if cached and mask.dim() == 2 and mask.shape[1] > length:
            mask = mask[:, mask.shape[1] - length :]  # cached tokens are not routed again
        if flat and mask.shape[1] == length:  # OPT's layers flatten (B, L, D)
            mask = mask.reshape(-1)
        if mask.dim() > len(wanted) and mask.shape[-1] == length:  # several texts of an example
            mask = mask.flatten(0, mask.dim() - len(wanted))
        if mask.shape != wanted:
            hint = "Pass mask=False to plug, or a function that gives the mask of these tokens."
            if mask.shape == wanted[::-1]:
                hint = "Pass batch_first=False to sparse: its tokens are (L, B, D)."
            reason = "the model's mask does not fit the tokens of a plugged layer"
            found = tuple(mask.shape)
            raise ShapeError(reason, field="mask", expected=tuple(wanted), found=found, hint=hint)
        return args, {**kwargs, "mask": mask}


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache of earlier tokens among the arguments of a model, or None."""
    return next((found for name in _CACHES if (found := given.get(name)) is not None), None)


def real_of(given: object, name: str, cache: Any = None) -> Tensor | None:
    """True for real tokens, of a mask whose name says what its values mean; `cache` is what the
    model is called with besides.

    Raises ConfigError for numbers that are neither 0 and 1 nor, of padding, additive.
    """
    mask: Any = given.get("full_attention") if isinstance(given, Mapping) else given
    if mask is None or mask.dim() == 4:
        return None if mask is None else _real_of_attention(mask, cache)
    return _real_of_padding(mask, name)


def _real_of_attention(mask: Tensor, cache: Any) -> Tensor:
    """Of what attends to what (B, 1, L, columns), as transformers makes it for a static cache: a
    token is real if it may attend to itself, in the column behind those that the cache holds.
    """
    rows, columns = mask.shape[2:]
    start = cache.get_seq_length() if hasattr(cache, "get_seq_length") else columns - rows
    place_L = torch.arange(rows, device=mask.device) + start
    place_BL1 = place_L[None, :, None].expand(mask.shape[0], rows, 1)
    own_BL = mask[:, 0].gather(2, place_BL1).squeeze(2)
    return own_BL > -1e3 if mask.is_floating_point() else own_BL.bool()


def _real_of_padding(mask: Tensor, name: str) -> Tensor:
    padding = "padding" in name
    if not mask.is_floating_point():
        return ~mask.bool() if padding else mask.bool()
    if padding:  # torch adds it to scores
        return mask == 0
    if is_compiling() or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
        hint = "Pass integers or bool, or a function as `mask`."
        reason = f"{name} of floats that are not 0 and 1 does not say which tokens are real"
        raise ConfigError(reason, field=name, hint=hint)
    return mask.bool()
