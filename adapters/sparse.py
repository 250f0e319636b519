"""Sparse replacements for the MLPs of known libraries, with the dense weights copied in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moezoo.adapters.probe import check_row_wise, check_twin
from moezoo.errors import ConfigError
from moezoo.experts.modules import ModuleExperts
from moezoo.private_torch import shallow_copy
from moezoo.sparse_mlp import SparseMLP

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
) -> Callable[[nn.Module], nn.Module]:
    """A `make` for `moezoo.plug`: a mixture of `num_experts` copies of the MLP it is given.

    Understands an MLP of its own (x -> y of the same width: transformers' T5 feed-forwards,
    `nn.Sequential`, any module with linear layers, GPT-2's `Conv1D` among them), and layers whose
    MLP is spread over attributes: `torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer`,
    and BERT's intermediate and output. What a module is taken for is tried, with tokens and weights
    drawn at random: it must be a function of single rows, and a layer must compute the same with
    one expert in the place of its MLP.

    Args:
        copy_weights: start every expert from the dense weights; False: draw them anew.
        router: None is "switch" with unit weight when weights are copied, so that the model
            computes at first what it did before, and plain "switch" otherwise.
        capacity, group, causal: see `moezoo.SparseMLP`.
        d_model: the width, where no linear layer of the module says it.
        batch_first: False for MLPs of your own on (L, B, D); layers of torch know theirs.

    Raises ConfigError for a module whose MLP it does not find, or that fails the trial.
    """
    if router is None:
        router = UNIT_SWITCH if copy_weights else "switch"

    def mixture(mlp: nn.Module, first: bool = batch_first) -> SparseMLP:
        width = _width(mlp) if d_model is None else d_model
        check_row_wise(mlp, width)
        experts = [copy.deepcopy(mlp) for _ in range(num_experts)]
        if not copy_weights:
            for expert in experts:
                _redraw(expert)
        made = SparseMLP(
            width,
            None,
            num_experts,
            router=router,
            capacity=capacity,
            experts=ModuleExperts(width, num_experts, modules=experts),
            group=group,
            causal=causal,
            batch_first=first,
        )
        weight = next(mlp.parameters(), torch.zeros((), device="cpu"))
        made.moe.router.to(weight.device, weight.dtype)
        return made

    def make(module: Any) -> nn.Module:
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            inputs = 1 if isinstance(module, nn.TransformerEncoderLayer) else 2
            check_twin(module, module.linear1.in_features, _of_one(_torch_layer), inputs)
            return _torch_layer(module, mixture)
        dense = getattr(getattr(module, "output", None), "dense", None)
        if dense is not None and hasattr(module, "intermediate"):
            check_twin(
                module, _width(nn.Sequential(module.intermediate, dense)), _of_one(_bert_layer)
            )
            return _bert_layer(module, mixture)
        return mixture(module)

    return make


Mixture = Callable[[nn.Module, bool], SparseMLP]


def _of_one(twin_of: Callable[[Any, Mixture], nn.Module]) -> Callable[[Any], nn.Module]:
    """A twin whose mixture is of one expert, the MLP itself."""

    def mixture(mlp: nn.Module, batch_first: bool = True) -> SparseMLP:
        width = _width(mlp)
        experts = ModuleExperts(width, 1, modules=[mlp])
        made = SparseMLP(
            width, None, 1, router=UNIT_SWITCH, experts=experts, batch_first=batch_first
        )
        return made.to(next(mlp.parameters()).device)

    return lambda layer: twin_of(layer, mixture)


def _torch_layer(layer: Any, mixture: Mixture) -> nn.Module:
    """A twin of a torch layer: linear1 becomes the mixture, the rest of the MLP passes through."""
    twin = shallow_copy(layer)
    function = layer.activation
    mlp = nn.Sequential(layer.linear1, _Function(function), layer.dropout, layer.linear2)
    twin.linear1 = mixture(mlp, layer.self_attn.batch_first)
    twin.linear2, twin.dropout = nn.Identity(), nn.Identity()
    twin.activation = _same
    twin.activation_relu_or_gelu = 0  # torch's fused inference path reads linear1.weight
    return twin  # type: ignore[no-any-return]


def _bert_layer(layer: Any, mixture: Mixture) -> nn.Module:
    """A twin of a BERT layer: intermediate becomes the mixture, output keeps norm and residual."""
    twin = shallow_copy(layer)
    twin.intermediate = mixture(nn.Sequential(layer.intermediate, layer.output.dense), True)
    twin.output = shallow_copy(layer.output)
    twin.output.dense = nn.Identity()
    return twin  # type: ignore[no-any-return]


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


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
    """What a linear layer reads and writes; transformers' Conv1D is one with its weight turned."""
    read, written = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(read, int) and isinstance(written, int):
        return read, written
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        read, written = module.weight.shape
        return int(read), int(written)
    return None


def _redraw(expert: Any) -> None:
    """Draw weights anew. Raises ConfigError for those that no module says how to draw."""
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
