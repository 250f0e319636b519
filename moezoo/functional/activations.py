"""Activations of the T5 family by name, and whether they gate a second projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.errors import ConfigError, did_you_mean

Activation = Callable[[Tensor], Tensor]


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_tanh_gelu: Activation = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, tuple[Activation, bool]] = {
    "relu": (F.relu, False),
    "gelu": (F.gelu, False),
    "gelu-tanh": (_tanh_gelu, False),
    "silu": (F.silu, False),
    "quick-gelu": (_quick_gelu, False),
    "squared-relu": (_squared_relu, False),
    "gated-gelu": (_tanh_gelu, True),  # T5 v1.1's gated GELU is the tanh approximation
    "gated-gelu-erf": (F.gelu, True),
    "gated-silu": (F.silu, True),
    "gated-relu": (torch.relu, True),
}


def activation(name: str) -> tuple[Activation, bool]:
    """The function of an activation name, and whether it gates: h = fn(x wi_0^T) * (x wi_1^T).

    Raises ConfigError naming the nearest for an unknown name.
    """
    if name not in _ACTIVATIONS:
        hint = did_you_mean(name, _ACTIVATIONS)
        raise ConfigError(f"unknown activation {name!r}", field="activation", hint=hint)
    return _ACTIVATIONS[name]
