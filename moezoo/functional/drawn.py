"""How weights start: by their fan-in, and linear maps that say so themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moezoo.functional.truncated_normal import truncated_normal_


@dataclass(frozen=True)
class FanIn:
    """Draw weights (..., out, in) of standard deviation scale * gain / sqrt(in).

    scale is the model's (1 where a module is built alone; `models/initialize.py` sets it), gain
    that of the place. truncated: cut at two standard deviations and widened again, so that `std`
    is what it says (Switch Transformers, 2101.03961, section 2.4); else a plain normal.
    """

    scale: float = 1.0
    gain: float = 1.0
    truncated: bool = True

    def __call__(self, weight: Tensor) -> None:
        std = self.scale * self.gain * weight.shape[-1] ** -0.5
        if self.truncated:
            truncated_normal_(weight, std=std)
        else:
            normal_(weight, std=std)


class DrawnLinear(nn.Linear):
    """y = x W^T [+ b] with W drawn by `initial`, which fills a tensor, and b zero."""

    initial: Callable[[Tensor], object]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        initial: Callable[[Tensor], object],
        *,
        bias: bool = False,
    ) -> None:
        self.initial = initial  # the constructor draws
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:
            return  # nothing to fill, and not every draw knows such tensors
        self.initial(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@torch.no_grad()
def normal_(weight: Tensor, *, std: float) -> Tensor:
    """Fill with N(0, std^2); half precision is drawn in float32 and rounded."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        wide = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        return weight.copy_(normal_(wide, std=std))
    return weight.normal_(std=std)


@torch.no_grad()
def orthogonal_(weight: Tensor) -> Tensor:
    """Fill with orthonormal rows (or columns, where there are more rows); half precision is
    computed in float32, since torch has no decomposition in it.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.copy_(nn.init.orthogonal_(wide))
