"""Sparse replacements for the MLPs of known libraries, with the dense weights copied in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moezoo.errors import ConfigError
from moezoo.experts.modules import ModuleExperts
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
) -> Callable[[nn.Module], nn.Module]:
    """A `make` for `moezoo.plug`: a mixture of `num_experts` copies of the MLP it is given.

    Understands an MLP of its own (x -> y of the same width: transformers' T5 feed-forwards,
    `nn.Sequential`, any module with two linear layers, GPT-2's `Conv1D` among them), and layers
    whose MLP is spread over attributes: `torch.nn.TransformerEncoderLayer` and
    `TransformerDecoderLayer`, and BERT's intermediate and output.

    Args:
        copy_weights: start every expert from the dense weights; False: draw them anew.
        router: None is "switch" with unit weight when weights are copied, so that the model
            computes at first what it did before, and plain "switch" otherwise.
        capacity, group, causal: see `moezoo.SparseMLP`.

    Raises ConfigError for a module whose MLP it does not find.
    """
    if router is None:
        router = UNIT_SWITCH if copy_weights else "switch"

    def mixture(mlp: nn.Module) -> SparseMLP:
        width = _width(mlp)
        experts = [copy.deepcopy(mlp) for _ in range(num_experts)]
        if not copy_weights:
            for expert in experts:
                _redraw(expert)
        container = ModuleExperts(width, num_experts, modules=experts)
        made = SparseMLP(
            width,
            None,
            num_experts,
            router=router,
            capacity=capacity,
            experts=container,
            group=group,
            causal=causal,
        )
        weight = next(mlp.parameters())
        made.moe.router.to(weight.device, weight.dtype)
        return made

    def make(module: nn.Module) -> nn.Module:
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return _torch_layer(module, mixture)
        if hasattr(module, "intermediate") and hasattr(module, "output"):
            return _bert_layer(module, mixture)
        return mixture(module)

    return make


def _torch_layer(layer: Any, mixture: Callable[[nn.Module], SparseMLP]) -> nn.Module:
    """A twin of a torch layer: linear1 becomes the mixture, the rest of the MLP passes through."""
    twin = _twin(layer)
    function = layer.activation
    mlp = nn.Sequential(layer.linear1, _Function(function), layer.dropout, layer.linear2)
    twin.linear1 = mixture(mlp)
    twin.linear2, twin.dropout = nn.Identity(), nn.Identity()
    twin.activation = _same
    twin.activation_relu_or_gelu = 0  # torch's fused inference path reads linear1.weight
    return twin  # type: ignore[no-any-return]


def _bert_layer(layer: Any, mixture: Callable[[nn.Module], SparseMLP]) -> nn.Module:
    """A twin of a BERT layer: intermediate becomes the mixture, output keeps norm and residual."""
    twin = _twin(layer)
    twin.intermediate = mixture(nn.Sequential(layer.intermediate, layer.output.dense))
    twin.output = _twin(layer.output)
    twin.output.dense = nn.Identity()
    return twin  # type: ignore[no-any-return]


def _twin(module: Any) -> Any:
    """A shallow copy whose children can be replaced without changing the original's."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


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
    """The width of an MLP: what its first linear layer reads and its last one writes."""
    found = [sizes for module in mlp.modules() if (sizes := _sizes(module)) is not None]
    if len(found) < 2 or found[0][0] != found[-1][1]:
        raise ConfigError(
            f"{type(mlp).__name__} is no MLP that moezoo knows",
            field="make",
            expected="two or more linear layers that end at the width they start from",
            found=found,
            hint="Pass a `make` of your own that returns a moezoo.SparseMLP.",
        )
    return found[0][0]


def _sizes(module: Any) -> tuple[int, int] | None:
    """What a linear layer reads and writes; transformers' Conv1D is one with its weight turned."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        read, written = module.weight.shape
        return int(read), int(written)
    return None


def _redraw(expert: Any) -> None:
    for module in expert.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif _sizes(module) is not None:  # Conv1D has no method for it
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
