"""RMS norm, T5's layer norm: no mean, no bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.config import SwitchConfig
from moezoo.functional.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight; the mean is taken in float32 (or float64)."""

    def __init__(self, d_model: int, *, eps: float = 1e-6, initial: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps, self.initial = eps, initial
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            if self.training and torch.is_grad_enabled():
                return rms_norm(x, self.weight, self.eps)
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch rounds half precision after the weight, T5 before it.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        y = (wide * scale).to(self.weight.dtype) * self.weight
        # A weight that is kept wider than the activations (FSDP2 in half precision) widens none.
        kept_wider = x.element_size() < self.weight.element_size() and x.element_size() == 2
        return y.to(x.dtype) if kept_wider else y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def norm_of(config: SwitchConfig) -> RMSNorm:
    """The norm of a config's width, epsilon and initial weight."""
    width, factor = config.d_model, config.initializer_factor
    return RMSNorm(width, eps=config.layer_norm_epsilon, initial=factor)
