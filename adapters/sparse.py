"""Sparse replacements for the MLPs of known libraries, with the dense weights copied in."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.adapters.mlp_form import Form, form_of, is_conv1d
from moezoo.adapters.probe import called, check_row_wise, check_sum, check_twin
from moezoo.adapters.spread import Spread, spread_of
from moezoo.errors import ConfigError
from moezoo.experts.base import Experts
from moezoo.experts.modules import ModuleExperts
from moezoo.experts.stacked import StackedExperts
from moezoo.layer import MoE
from moezoo.sparse_mlp import SparseMLP

_PLAIN = (bool, int, float, str, type(None))  # defaults of arguments that are compared, and kept
UNIT_SWITCH = {"name": "switch", "weight": "unit"}


def sparse(
    num_experts: int,
    *,
    copy_weights: bool = True,
    router: object = None,
    capacity: object | None = None,
    group: str | int | None = None,
    causal: bool = False,
    d_model: int | None = None,
    batch_first: bool = True,
) -> Sparse:
    """A `make` for `moezoo.plug`: a mixture of `num_experts` copies of the MLP it is given.

    Understands an MLP of its own (x -> y of the same width, or x and a residual -> their sum:
    transformers' feed-forwards, `nn.Sequential`, any module with linear layers, GPT-2's `Conv1D`
    among them), and layers whose MLP is spread over attributes: `torch.nn.TransformerEncoderLayer`
    and `TransformerDecoderLayer`, BERT's intermediate and output, and fc1 and fc2 of BART, OPT and
    Whisper. What a module is taken for is tried, with tokens and weights drawn at random: it must
    be a function of single rows, and a layer must compute the same with one expert in the place of
    its MLP.

    An MLP of two or three linear maps, gated or not, fused or not, with biases or without, becomes
    one `StackedExperts`; any other is copied into `ModuleExperts`, which run one by one. Copies of
    what is frozen are frozen.

    Args:
        copy_weights: start every expert from the dense weights; False: draw them anew.
        router: None is "switch" with unit weight when weights are copied, so that the model
            computes at first what it did before, and plain "switch" otherwise.
        capacity, group, causal: see `moezoo.SparseMLP`.
        d_model: the width, where no linear layer of the module says it.
        batch_first: False for MLPs of your own on (L, B, D); layers of torch know theirs.

    Calling it raises ConfigError for a module whose MLP it does not find, that fails the trial, or
    that holds experts already.
    """
    if router is None:
        router = UNIT_SWITCH if copy_weights else "switch"
    return Sparse(num_experts, copy_weights, router, capacity, group, causal, d_model, batch_first)


@dataclass(frozen=True)
class Sparse:
    """What `sparse` gives: its arguments, by their names."""

    num_experts: int
    copy_weights: bool
    router: object
    capacity: object | None
    group: str | int | None
    causal: bool
    d_model: int | None
    batch_first: bool

    def __call__(self, module: nn.Module) -> nn.Module:
        """The replacement of a module, which is left as it is."""
        if any(isinstance(part, MoE) for part in module.modules()):
            hint = "Choose other modules: `plug` has replaced this one, or it is a sparse layer."
            reason = f"{type(module).__name__} holds experts already"
            raise ConfigError(reason, field="where", hint=hint)
        spread = spread_of(module)
        if spread is None:
            return self._mixture(module, self.batch_first)
        width = _width(spread.mlp(module))
        try:
            check_twin(module, width, lambda layer: _of_one(spread, layer), spread.inputs)
        except ConfigError as refusal:
            try:  # an MLP may hold its parts by the same names, and more of them
                return self._mixture(module, self.batch_first)
            except ConfigError:
                raise refusal from None
        return spread.twin(module, self._mixture(spread.mlp(module), spread.batch_first(module)))

    def _mixture(self, mlp: nn.Module, batch_first: bool) -> SparseMLP:
        if isinstance(mlp, torch.jit.ScriptModule):
            hint = "Plug in before torch.jit.script."
            reason = "a scripted module cannot be taken for an MLP"
            raise ConfigError(reason, field="make", found=type(mlp).__name__, hint=hint)
        width = _width(mlp) if self.d_model is None else self.d_model
        residual = _takes_residual(mlp)
        if residual:
            check_sum(mlp, width)
        else:
            check_row_wise(mlp, width)
        form = form_of(mlp, width, _without_residual if residual else called)
        if form is None and residual:
            check_row_wise(mlp, width)  # which says what it lacks
        if form is None:
            experts: Experts = self._copies(mlp, width)
        else:
            experts = _stacked(mlp, form, width, self.num_experts)
            if not self.copy_weights:
                experts.requires_grad_(True).reset_own()
        made = PluggedMLP(
            width,
            None,
            self.num_experts,
            router=self.router,
            capacity=self.capacity,
            experts=experts,
            group=self.group,
            causal=self.causal,
            batch_first=batch_first,
        )
        made.take_words_of(mlp, 1 + residual)
        made.after = nn.Dropout(form.after) if form is not None and form.after else None
        weight = next(mlp.parameters(), torch.zeros((), device="cpu"))
        made.moe.router.to(weight.device, weight.dtype)
        return made

    def _copies(self, mlp: nn.Module, width: int) -> ModuleExperts:
        experts = [copy.deepcopy(mlp) for _ in range(self.num_experts)]
        for expert in experts if not self.copy_weights else ():
            _redraw(expert)
        return ModuleExperts(width, self.num_experts, modules=experts)


class PluggedMLP(SparseMLP):
    """A `SparseMLP` in the place of an MLP that drops out its result or adds it to a residual, and
    is called by the words that the MLP had for its arguments (`names`); `others` are further ones,
    with the values that the MLP was tried with.
    """

    after: nn.Dropout | None
    names: tuple[str, ...] = ()
    others: Mapping[str, object] = MappingProxyType({})

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_forward_pre_hook(_in_order, with_kwargs=True)

    def take_words_of(self, mlp: nn.Module, inputs: int) -> None:
        """Be called as an MLP whose first `inputs` arguments are tokens."""
        found = inspect.signature(mlp.forward).parameters.values()
        self.names = tuple(p.name for p in found)[:inputs]
        self.others = {
            p.name: p.default if isinstance(p.default, _PLAIN) else p.empty
            for p in list(found)[inputs:]
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        }

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """(..., D) -> (..., D), plus `residual` of the same shape; see `SparseMLP`. Raises
        ConfigError for a second tensor in the place of an MLP that adds none.
        """
        if residual is not None and len(self.names) < 2:
            hint = "Pass a `make` of your own that knows what it is for."
            reason = "the MLP that was replaced adds no second tensor, and is called with one"
            raise ConfigError(reason, field="make", hint=hint)
        y = super().forward(x, mask=mask, token_ids=token_ids)
        if self.after is not None:
            y = self.after(y)
        return y if residual is None else residual + y


def _in_order(
    layer: PluggedMLP, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments that are given by the words of the MLP, by their places; further ones, of which
    experts know nothing, have to be what it was tried with. Raises ConfigError.
    """
    inputs, taken = len(layer.names), _own_words(layer)
    further = dict(zip(layer.others, args[inputs:], strict=False))
    further |= {n: kwargs[n] for n in layer.others if n in kwargs and n not in taken}
    for name, value in further.items():
        if not _is_same(value, layer.others[name]):
            hint = "Pass a `make` of your own that knows what it is for."
            reason = f"experts take no {name!r}, and the MLP that was replaced is called with one"
            raise ConfigError(reason, field="make", hint=hint)
    named = [name for name in layer.names[len(args) :] if name in kwargs]
    if not named and not further:
        return None
    rest = {n: value for n, value in kwargs.items() if n not in named and n not in further}
    beyond = args[inputs + len(layer.others) :]
    return (*args[:inputs], *(kwargs[name] for name in named), *beyond), rest


def _own_words(layer: PluggedMLP) -> tuple[str, ...]:
    """What a layer takes by itself, whatever the MLP took by that word."""
    return ("mask", "token_ids") if layer.moe.router.needs_token_ids else ("mask",)


def _is_same(value: object, default: object) -> bool:
    return value is default or (
        type(value) is type(default) and isinstance(value, _PLAIN) and value == default
    )


def _stacked(mlp: nn.Module, form: Form, width: int, num_experts: int) -> StackedExperts:
    """Copies of an MLP as one stack, of its dtype and on its device."""
    maps = form.maps(mlp)
    biased = any(found.bias is not None for found in maps)
    with torch.device("meta"):
        made = StackedExperts(
            width,
            maps[-1].weight.shape[1],
            num_experts,
            activation=form.activation,
            dropout=form.dropout,
            bias=biased,
        )
    for name, found in zip(made.names, maps, strict=True):
        setattr(made, name, _copied(found.weight, num_experts))
        if biased:
            none = torch.zeros_like(found.weight[:, 0])
            bias = none if found.bias is None else found.bias
            setattr(made, f"{name}_bias", _copied(bias, num_experts))
    return made


def _copied(tensor: Tensor, times: int) -> nn.Parameter:
    copies = tensor.detach().expand(times, *tensor.shape)
    whole = copies.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(whole, requires_grad=tensor.requires_grad)


def _takes_residual(mlp: nn.Module) -> bool:
    """Whether an MLP wants a second tensor, by whatever name: BLOOM's and MPT's residual."""
    parameters = inspect.signature(mlp.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(required) == 2


def _without_residual(module: nn.Module, original: nn.Module, x: Tensor) -> Tensor:
    return called(module, original, x, torch.zeros_like(x))


def _of_one(spread: Spread, layer: nn.Module) -> nn.Module:
    """A twin whose mixture is of one expert, the MLP itself."""
    mlp = spread.mlp(layer)
    width = _width(mlp)
    experts = ModuleExperts(width, 1, modules=[mlp])
    first = spread.batch_first(layer)
    made = SparseMLP(width, None, 1, router=UNIT_SWITCH, experts=experts, batch_first=first)
    return spread.twin(layer, made.to(next(mlp.parameters()).device))


def _width(mlp: nn.Module) -> int:
    """The width that the first linear layer of an MLP reads; whether it is the MLP's, is tried."""
    found = [sizes for module in mlp.modules() if (sizes := _sizes(module)) is not None]
    if not found:
        raise ConfigError(
            f"{type(mlp).__name__} is no MLP that moezoo knows",
            field="make",
            expected="linear layers, the first of which reads the tokens",
            hint="Pass sparse(..., d_model=...), or a `make` that returns a moezoo.SparseMLP.",
        )
    return found[0][0]


def _sizes(module: Any) -> tuple[int, int] | None:
    """What a linear layer reads and writes."""
    read, written = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(read, int) and isinstance(written, int):
        return read, written
    if is_conv1d(module):
        read, written = module.weight.shape
        return int(read), int(written)
    return None


def _redraw(expert: Any) -> None:
    """Draw weights anew. Raises ConfigError for those that no module says how to draw."""
    expert.requires_grad_(True)
    for name, module in expert.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif _sizes(module) is not None:  # Conv1D has no method for it
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        else:
            reason = f"{type(module).__name__} {name!r} has weights and no reset_parameters"
            hint = "Copy the dense weights, or give it that method."
            raise ConfigError(reason, field="copy_weights", hint=hint)
