"""Adafactor at the rate that it is given (arXiv 1804.04235 with the relative step off)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moezoo.functional.shards import is_divided, local_of, placed_like, summed_over_shards

_DECAY = 0.8  # section 7.2: beta2 of step t is 1 - t^-0.8
REDUCED = {"row_var": -1, "col_var": -2}  # what of its memory is a mean over which dimension
_SMALLEST = 1e-3  # section 8, epsilon 2: the least scale of a parameter


class Adafactor(Optimizer):
    """What `torch.optim.Adafactor` computes, but for the rate: torch takes at most 1 / sqrt(step),
    whatever it is told, which is 1e-2 after 10,000 steps. T5 and Switch were trained without that.

    The rate is relative to the root mean square of a parameter, updates are clipped to one of 1, a
    matrix's second moments are kept by row and column. No value is read on the host. A sharded
    parameter (DTensor) moves as the whole one would: its rows, columns and root mean squares are
    summed over the parts, and its memory is sharded as it is.

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

    def _move(self, whole: Tensor, grad: Tensor, rate: float, weight_decay: float) -> None:
        state, parameter = self.state[whole], local_of(whole)
        step = state["step"] = state.get("step", torch.tensor(0.0, device="cpu")) + 1
        scale = _root_mean_square(parameter, whole).clamp(min=_SMALLEST) * rate
        if weight_decay:
            parameter.mul_(1 - rate * weight_decay)
        smallest = torch.finfo(parameter.dtype).eps
        share = float(step) ** -_DECAY
        grad = local_of(grad)
        variance = _variance(state, grad, whole, share, smallest)
        update = variance.clamp_(min=smallest**2).rsqrt_().mul_(grad)
        parameter.sub_(update.mul_(scale / _root_mean_square(update, whole).clamp(min=1.0)))


def _variance(
    state: dict[str, Any], grad: Tensor, whole: Tensor, share: float, smallest: float
) -> Tensor:
    """The estimated second moment of every entry; `share` of the new one goes into the memory."""
    if grad.dim() < 2:
        return _memory(state, "variance", grad.square(), whole, share).clone()
    row, column = (
        _memory(state, name, _mean_square(grad, dim, whole), whole, share)
        for name, dim in REDUCED.items()
    )
    product: Tensor = row @ column
    return product.div_(_mean_of_rows(row, whole).clamp(min=smallest))


def _memory(state: dict[str, Any], name: str, mean: Tensor, whole: Tensor, share: float) -> Tensor:
    """This rank's part of what is remembered of a mean, with `share` of the new one in it."""
    if name not in state:
        state[name] = placed_like(whole, torch.zeros_like(mean), reduced=REDUCED.get(name))
    moment: Tensor = local_of(state[name]).lerp_(mean, share)
    return moment


def _mean_square(grad: Tensor, dim: int, whole: Tensor) -> Tensor:
    """Over one dimension, without a tensor of all squares."""
    norm: Tensor = torch.linalg.vector_norm(grad, dim=dim, keepdim=True)
    return summed_over_shards(norm.square_(), whole, [dim]).div_(whole.shape[dim])


def _mean_of_rows(row: Tensor, whole: Tensor) -> Tensor:
    if not is_divided(whole):
        mean: Tensor = row.mean(-2, keepdim=True)
        return mean
    return summed_over_shards(row.sum(-2, keepdim=True), whole, [-2]) / whole.shape[-2]


def _root_mean_square(part: Tensor, whole: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(part)
    if is_divided(whole):
        norm = summed_over_shards(norm.square(), whole, range(whole.dim())).sqrt()
    mean: Tensor = norm / max(whole.numel(), 1) ** 0.5
    return mean
