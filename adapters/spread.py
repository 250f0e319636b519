"""Layers whose MLP has no module of its own: its parts are attributes of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moezoo.private_torch import shallow_copy

_BY_NAME = (  # the linear layers, the activation, and the probability of dropout between them
    ("fc1", "fc2", "activation_fn", "activation_dropout"),
    ("ffn", "ffn_output", "activation", ""),
)


class Spread:
    """How a kind of layer holds its MLP, and a twin of such a layer around something else.

    Attributes: inputs: how many hidden states the layer is called with.
    """

    inputs = 1

    def mlp(self, layer: Any) -> nn.Module:
        """Its MLP as one module, of the layer's own parts."""
        raise NotImplementedError

    def twin(self, layer: Any, mixture: nn.Module) -> nn.Module:
        """The layer with the mixture in the place of its MLP, all else shared."""
        raise NotImplementedError

    def batch_first(self, layer: Any) -> bool:
        """Whether its hidden states are (B, L, D)."""
        return True


def spread_of(module: Any) -> Spread | None:
    """How a layer holds its MLP; None: it is none whose MLP is spread over attributes."""
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _Torch(1 if isinstance(module, nn.TransformerEncoderLayer) else 2)
    dense = getattr(getattr(module, "output", None), "dense", None)
    if dense is not None and hasattr(module, "intermediate"):
        return _Bert()
    for names in _BY_NAME:
        linear = all(isinstance(getattr(module, name, None), nn.Linear) for name in names[:2])
        if (
            linear
            and callable(getattr(module, names[2], None))
            and len(list(module.children())) > 3
        ):
            return _Named(*names)
    return None


class _Torch(Spread):
    """torch's layers: linear1 becomes the mixture, the rest of the MLP passes through."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs

    def mlp(self, layer: Any) -> nn.Module:
        function = Function(layer.activation)
        return nn.Sequential(layer.linear1, function, layer.dropout, layer.linear2)

    def twin(self, layer: Any, mixture: nn.Module) -> nn.Module:
        twin: Any = shallow_copy(layer)
        twin.linear1 = mixture
        twin.linear2, twin.dropout = nn.Identity(), nn.Identity()
        twin.activation = _same
        twin.activation_relu_or_gelu = 0  # torch's fused inference path reads linear1.weight
        return twin  # type: ignore[no-any-return]

    def batch_first(self, layer: Any) -> bool:
        return bool(layer.self_attn.batch_first)


class _Bert(Spread):
    """BERT's: intermediate becomes the mixture, output keeps norm and residual."""

    def mlp(self, layer: Any) -> nn.Module:
        return nn.Sequential(layer.intermediate, layer.output.dense)

    def twin(self, layer: Any, mixture: nn.Module) -> nn.Module:
        twin: Any = shallow_copy(layer)
        twin.intermediate = mixture
        twin.output = shallow_copy(layer.output)
        twin.output.dense = nn.Identity()
        return twin  # type: ignore[no-any-return]


class _Named(Spread):
    """Two linear layers of the layer itself, as in BART, OPT, Whisper and ALBERT."""

    def __init__(self, first: str, second: str, function: str, dropout: str) -> None:
        self.first, self.second, self.function, self.dropout = first, second, function, dropout

    def mlp(self, layer: Any) -> nn.Module:
        function = Function(getattr(layer, self.function))
        p = getattr(layer, self.dropout, 0.0) if self.dropout else 0.0
        first, second = getattr(layer, self.first), getattr(layer, self.second)
        return nn.Sequential(first, function, nn.Dropout(float(p)), second)

    def twin(self, layer: Any, mixture: nn.Module) -> nn.Module:
        twin: Any = shallow_copy(layer)
        setattr(twin, self.first, mixture)
        setattr(twin, self.second, nn.Identity())
        if isinstance(getattr(layer, self.function), nn.Module):
            setattr(twin, self.function, nn.Identity())
        else:
            setattr(twin, self.function, _same)
        if self.dropout and hasattr(layer, self.dropout):
            setattr(twin, self.dropout, 0.0)  # the experts drop their own hidden units
        return twin  # type: ignore[no-any-return]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
