"""What an MLP is: two or three linear maps, an activation and dropout, found by trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.adapters.probe import called, stranger_of
from moezoo.config import ACTIVATIONS
from moezoo.functional.activations import activation as activation_of
from moezoo.ops.observed import is_observed

_TOLERANCE = 1e-7  # in float64: the gelus are 1e-4 apart, spellings of one of them 1e-9
_FAR = 1e4  # where relu6 and other limits of hidden units show
_MARK = 3.0


@dataclass(frozen=True)
class LinearMap:
    """weight (outputs, inputs) and bias (outputs,) or None; what is frozen wants no gradient."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, chosen: slice) -> LinearMap:
        """Some of its outputs."""
        return LinearMap(self.weight[chosen], None if self.bias is None else self.bias[chosen])

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Form:
    """y = after(outer(dropout(fn(inner_0(x)) [* inner_1(x)]))).

    Fields: order: which linear layer of the module is which map, the outer last; halves: of a fused
    pair of inner maps, how each is cut out; activation; dropout: on hidden units; after: on y.
    """

    order: tuple[int, ...]
    halves: tuple[slice, slice] | None
    activation: str
    dropout: float = 0.0
    after: float = 0.0

    def maps(self, module: nn.Module) -> list[LinearMap]:
        """The inner maps of a module of this form, and the outer one."""
        found = _linear_maps(module)
        assert found is not None
        *inner, outer = (found[index] for index in self.order)
        if self.halves is not None:
            inner = [inner[0].rows(half) for half in self.halves]
        return [*inner, outer]

    def hidden(self, maps: Sequence[LinearMap], x: Tensor) -> Tensor:
        """The hidden units of tokens."""
        function, _ = activation_of(self.activation)
        first, *others = maps[:-1]
        units = function(first(x))
        return units * others[0](x) if others else units

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        maps = self.maps(module)
        return maps[-1](self.hidden(maps, x))


def form_of(mlp: nn.Module, d_model: int, call: Callable[..., Tensor] = called) -> Form | None:
    """The form of an MLP (..., D) -> (..., D), or None: it is another, or somebody observes it.

    A copy with weights drawn at random computes in float64 what a form would: names and classes
    prove nothing. Where dropout stands is tried too, that of modules and that of functions.
    """
    maps = _linear_maps(mlp)
    if maps is None or any(is_observed(part) for part in mlp.modules()):
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        trial = stranger_of(mlp).double().cpu()
        x = torch.randn(5, d_model, dtype=torch.float64)
        expected, far = call(trial, mlp, x), call(trial, mlp, _FAR * x)
        for form in _candidates(maps, d_model):
            if _agree(form(trial, x), expected) and _agree(form(trial, _FAR * x), far):
                return _with_dropout(form, trial, x, expected, lambda: call(trial, mlp, x))
    return None


def _candidates(maps: Sequence[LinearMap], d_model: int) -> Iterator[Form]:
    """Every form that maps of these shapes may have."""
    for order in itertools.permutations(range(len(maps))):
        inner, outer = [maps[i] for i in order[:-1]], maps[order[-1]]
        width = outer.weight.shape[1]
        if outer.weight.shape[0] != d_model or any(m.weight.shape[1] != d_model for m in inner):
            continue
        rows = [m.weight.shape[0] for m in inner]
        cuts: list[tuple[slice, slice] | None] = []
        if rows == [width] or rows == [width, width]:
            cuts = [None]
        elif rows == [2 * width]:
            low, high = slice(0, width), slice(width, None)
            even, odd = slice(0, None, 2), slice(1, None, 2)
            cuts = [(low, high), (high, low), (even, odd), (odd, even)]
        for halves in cuts:
            gated = len(inner) == 2 or halves is not None
            for name in ACTIVATIONS:
                if activation_of(name)[1] == gated:
                    yield Form(order, halves, name)


def _with_dropout(
    form: Form, trial: nn.Module, x: Tensor, expected: Tensor, call: Callable[[], Tensor]
) -> Form | None:
    """The form with dropout where the module has it; None where no form has it there."""
    maps = form.maps(trial)
    hidden = maps[-1](_MARK * form.hidden(maps, x))
    found = {"dropout": 0.0, "after": 0.0}
    for layer in [m for m in trial.modules() if isinstance(m, nn.Dropout)]:
        p, layer.p = layer.p, 0.0
        handle = layer.register_forward_hook(lambda module, args, out: _MARK * out)
        y = call()
        handle.remove()
        where = "dropout" if _agree(y, hidden) else "after" if _agree(y, _MARK * expected) else ""
        if where and not found[where]:
            found[where] = p
        elif p and not _agree(y, expected):  # elsewhere, or twice in one place
            return None
    trial.train()
    torch.manual_seed(0)
    if _agree(call(), expected):
        return Form(form.order, form.halves, form.activation, **found)
    return _with_drawn(form, trial, x, expected, call) if not any(found.values()) else None


def _with_drawn(
    form: Form, trial: nn.Module, x: Tensor, expected: Tensor, call: Callable[[], Tensor]
) -> Form | None:
    """The form with dropout by a function, whose probability is an attribute of a module: drawn by
    the same seed it drops the same.
    """
    maps = form.maps(trial)
    torch.manual_seed(0)
    y = call()
    values = [v for module in trial.modules() for v in vars(module).values()]
    for p in {v for v in values if isinstance(v, float) and 0.0 < v < 1.0}:
        torch.manual_seed(0)
        if _agree(F.dropout(expected, p), y):
            return Form(form.order, form.halves, form.activation, after=p)
        torch.manual_seed(0)
        if _agree(maps[-1](F.dropout(form.hidden(maps, x), p)), y):
            return Form(form.order, form.halves, form.activation, dropout=p)
    return None


def _linear_maps(module: nn.Module) -> list[LinearMap] | None:
    """The two or three linear layers that hold all the tensors of a module, as they are: none whose
    weight is made of others, as a parametrisation's, or needs a scale.
    """
    layers = [part for part in module.modules() if isinstance(part, nn.Linear) or is_conv1d(part)]
    held = [id(p) for layer in layers for p in layer.parameters()]
    own, every = set(held), {id(p) for p in module.parameters()}
    if len(layers) not in (2, 3) or own != every or len(held) != len(own):  # a tied one is another
        return None
    if next(module.buffers(), None) is not None:  # which may be 1 today
        return None
    if not {"weight", "bias"}.issuperset(
        n for layer in layers for n, _ in layer.named_parameters()
    ):
        return None
    return [_linear_map(layer) for layer in layers]


def _linear_map(layer: Any) -> LinearMap:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    weight = weight.t() if is_conv1d(layer) else weight
    if bias is not None:
        bias.requires_grad_(layer.bias.requires_grad)
    return LinearMap(weight.requires_grad_(layer.weight.requires_grad), bias)


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' linear layer with its weight turned."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
