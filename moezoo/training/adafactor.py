"""Adafactor at the rate that it is given (arXiv 1804.04235 with the relative step off)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_DECAY = 0.8  # section 7.2: beta2 of step t is 1 - t^-0.8
_SMALLEST = 1e-3  # section 8, epsilon 2: the least scale of a parameter


class Adafactor(Optimizer):
    """What `torch.optim.Adafactor` computes, but for the rate: torch takes at most 1 / sqrt(step),
    whatever it is told, which is 1e-2 after 10,000 steps. T5 and Switch were trained without that.

    The rate is relative to the root mean square of a parameter, updates are clipped to one of 1, a
    matrix's second moments are kept by row and column. No value is read on the host.

    Args:
        groups: parameters, or groups of them with rates of their own. lr: the rate.
        weight_decay: times the rate, taken off every step.
    """

    def __init__(
        self,
        groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, rate: float, weight_decay: float) -> None:
        state = self.state[parameter]
        step = state["step"] = state.get("step", torch.tensor(0.0, device="cpu")) + 1
        scale = _root_mean_square(parameter).clamp(min=_SMALLEST) * rate
        if weight_decay:
            parameter.mul_(1 - rate * weight_decay)
        smallest = torch.finfo(parameter.dtype).eps
        share = float(step) ** -_DECAY
        update = _variance(state, grad, share, smallest).clamp_(min=smallest**2).rsqrt_().mul_(grad)
        parameter.sub_(update.mul_(scale / _root_mean_square(update).clamp(min=1.0)))


def _variance(state: dict[str, Any], grad: Tensor, share: float, smallest: float) -> Tensor:
    """The estimated second moment of every entry; `share` of the new one goes into the memory."""
    if grad.dim() < 2:
        memory = state.setdefault("variance", torch.zeros_like(grad))
        moment: Tensor = memory.lerp_(grad.square(), share)
        return moment.clone()
    means = {"row_var": _mean_square(grad, -1), "col_var": _mean_square(grad, -2)}
    row, column = (
        state.setdefault(name, torch.zeros_like(mean)).lerp_(mean, share)
        for name, mean in means.items()
    )
    product: Tensor = row @ column
    return product.div_(row.mean(-2, keepdim=True).clamp(min=smallest))


def _mean_square(grad: Tensor, dim: int) -> Tensor:
    """Over one dimension, without a tensor of all squares."""
    norm: Tensor = torch.linalg.vector_norm(grad, dim=dim, keepdim=True)
    return norm.square_().div_(grad.shape[dim])


def _root_mean_square(tensor: Tensor) -> Tensor:
    mean: Tensor = torch.linalg.vector_norm(tensor) / max(tensor.numel(), 1) ** 0.5
    return mean
