"""Gates: scores of experts, always computed in float32 or better (selective precision, section
2.4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 when the input is float64."""
    return torch.promote_types(dtype, torch.float32)


def gate_logits(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Expert scores (T, E) of tokens (T, D) for a classifier (E, D) [+ (E,)].

    Switch Transformers, eq. 1 before the softmax. Autocast is switched off around the product:
    under it, a float32 gate would silently run in bfloat16.
    """
    dtype = gate_dtype(x_TD.dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def jittered(x_TD: Tensor, epsilon: float) -> Tensor:
    """A copy of x in gate precision, each entry times U(1 - epsilon, 1 + epsilon) (section 2.4).

    The multiplication is on the router's input; the experts never see it.
    """
    x_TD = x_TD.to(gate_dtype(x_TD.dtype))
    return x_TD * torch.empty_like(x_TD).uniform_(1.0 - epsilon, 1.0 + epsilon)
