"""Each token's weighted sum over its experts, of networks that are stacked by another's rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moezoo.functional.batch_products import HALVES, batch_outer, batch_products, by_expert
from moezoo.functional.dispatch import combine, dispatch
from moezoo.functional.expert_strips import Batch, Plan, Strip, planned
from moezoo.functional.gated_units import SiluGate
from moezoo.ops.eager import is_eager, is_followed, plain_gradients
from moezoo.ops.grouped_linear import grouped_linear
from moezoo.ops.memory import large_empty, stacked_gradient
from moezoo.ops.products import shared_rows
from moezoo.ops.row_sums import row_sums
from moezoo.records import Assignment

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Networks:
    """E networks x -> after(function(x up^T + up_bias) down^T + down_bias).

    Fields: up (E, H, D), down (E, O, F), of any strides; function: (n, H) -> (n, F), row by row,
    gating included; up_bias (E, H), down_bias (E, O); after: (n, O) -> (n, O), row by row; pure:
    whether `function` draws nothing, has no parameters and may be called again in backward.
    """

    up: Tensor
    down: Tensor
    function: Rows
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    after: Rows | None = None
    pure: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.up, self.down, self.up_bias, self.down_bias


def routed_mlp(x: Tensor, expert: Tensor, weight: Tensor, networks: Networks) -> Tensor:
    """y[t] = sum over k of weight[t, k] * network_expert[t, k](x[t]).

    On a CPU a cache-full of rows goes from its tokens to its results at a time, backward computes
    the hidden units again from what `function` was applied to, and experts without rows cost
    nothing. Elsewhere, and under `torch.compile`, autocast and transforms, the same is composed of
    `grouped_linear`.

    Args:
        x: (T, D). expert: (T, K) int64; numbers of E and more stand for no expert (those of another
            device), whose weight counts as 0. weight: (T, K), of any floating dtype.

    Returns:
        (T, O) in the dtype of x. Twice differentiable.

    Raises RoutingError for numbers below 0, where the host looks at them.
    """
    if not _fuses(x, expert, weight, networks):
        return _composed(x, expert, weight, networks)
    tensors = [t for t in (x, weight, *networks.tensors) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out: Tensor = _Routed.apply(networks.function, x, expert, weight, *networks.tensors)  # type: ignore[no-untyped-call]
        return out
    plan = _planned(expert, networks, training=False)
    return row_sums(_results(x, plan, networks, None), plan.row, weight).to(x.dtype)


def _fuses(x: Tensor, expert: Tensor, weight: Tensor, networks: Networks) -> bool:
    if not (networks.pure and networks.after is None and expert.numel() and is_eager()):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    for tensor in (x, expert, weight, *networks.tensors):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.is_cpu:
            return False
    return all(tensor is None or tensor.dtype == x.dtype for tensor in networks.tensors)


def _composed(x: Tensor, expert: Tensor, weight: Tensor, networks: Networks) -> Tensor:
    tokens, choices = expert.shape
    number = networks.up.shape[0]
    expert_N = expert.t().reshape(-1)
    kept_N = expert_N < number
    assignment = Assignment(
        token=torch.arange(tokens, device=x.device).repeat(choices),
        expert=torch.where(kept_N, expert_N, 0),
        weight=weight.t().reshape(-1),
        kept=kept_N,
        num_tokens=tokens,
        num_experts=number,
        group_size=tokens,
        choices=choices,
        rank_major=True,
    )
    slots, order = dispatch(x, assignment)
    h_ND = grouped_linear(slots.x, networks.up, slots.counts, bias=networks.up_bias)
    hidden_ND = networks.function(h_ND)
    y_ND = grouped_linear(hidden_ND, networks.down, slots.counts, bias=networks.down_bias)
    y_ND = y_ND if networks.after is None else networks.after(y_ND)
    return combine(y_ND, assignment, order).to(x.dtype)


def _planned(expert: Tensor, networks: Networks, *, training: bool) -> Plan:
    up = networks.up
    shared = shared_rows(up, training=training)
    return planned(expert, up.shape, shared, longer=up.dtype in HALVES)


def _results(x: Tensor, plan: Plan, networks: Networks, saved: list[Tensor] | None) -> Tensor:
    """The experts' rows (N, O), not weighed; what `function` was applied to goes to `saved`."""
    rows, width = plan.rows, networks.down.shape[1]
    training, whole = saved is not None, len(plan.strips) == 1 and plan.used == rows
    y_NO = None if whole else large_empty((rows, width), x.dtype)
    if y_NO is not None:
        y_NO[plan.used :].zero_()
    for strip in plan.strips:
        x_nD = plan.taken(x, strip.rows)
        h_nH = batch_products(x_nD, networks.up, networks.up_bias, strip, training=training)
        if saved is not None:
            saved.append(h_nH)
        hidden_nF = networks.function(h_nH)
        place = None if y_NO is None else y_NO[strip.rows]
        y_nO = batch_products(
            hidden_nF, networks.down, networks.down_bias, strip, out=place, training=training
        )
    return y_nO if y_NO is None else y_NO


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Rows, x: Tensor, expert: Tensor, weight: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        up, down, up_bias, down_bias = tensors
        networks = Networks(up, down, function, up_bias, down_bias, pure=True)  # type: ignore[arg-type]
        plan = _planned(expert, networks, training=True)
        saved: list[Tensor] = []
        y_NO = _results(x, plan, networks, saved)
        ctx.function, ctx.plan = function, plan
        ctx.save_for_backward(x, expert, weight, *tensors, *saved)
        return row_sums(y_NO, plan.row, weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, expert, weight, up, down, up_bias, down_bias, *saved = ctx.saved_tensors
        networks = Networks(up, down, ctx.function, up_bias, down_bias, pure=True)
        wants = [n for i, n in enumerate(ctx.needs_input_grad) if i not in (0, 2)]
        if is_followed(grad):
            found = _plain_gradients(x, expert, weight, networks, grad, wants)
        else:
            found = _Backward(ctx.plan, x, weight, networks, grad, wants).of(saved)
        return None, found[0], None, *found[1:]


def _plain_gradients(
    x: Tensor, expert: Tensor, weight: Tensor, networks: Networks, grad: Tensor, wants: list[bool]
) -> list[Tensor | None]:
    """The gradients as functions that autograd can follow."""
    given = (x, weight, *networks.tensors)
    there = [i for i, t in enumerate(given) if t is not None]

    def made(*tensors: Tensor) -> Tensor:
        own: list[Tensor | None] = [None] * len(given)
        for index, tensor in zip(there, tensors, strict=True):
            own[index] = tensor
        x, weight, up, down, *biases = own
        assert x is not None and weight is not None and up is not None and down is not None
        return _composed(
            x, expert, weight, Networks(up, down, networks.function, biases[0], biases[1])
        )

    present = [t for t in given if t is not None]
    found = iter(plain_gradients(made, present, grad, [wants[i] for i in there]))
    return [next(found) if t is not None else None for t in given]


class _Backward:
    """The gradients of `routed_mlp`, a strip of rows after the other."""

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        weight: Tensor,
        networks: Networks,
        grad: Tensor,
        wants: list[bool],
    ) -> None:
        self.plan, self.x, self.networks, self.grad = plan, x, networks, grad.contiguous()
        self.wants_x, self.wants_weight, *wants_tensors = wants
        self.weight_N1 = weight.reshape(-1).index_select(0, plan.pair)[:, None]
        if plan.spares:
            self.weight_N1[plan.spares] = 0.0
        self.grads = [
            _gradient(t, plan.hit) if t is not None and want else None
            for t, want in zip(networks.tensors, wants_tensors, strict=True)
        ]
        self.weight = weight
        rows = plan.rows
        self.grad_x = large_empty((rows, x.shape[1]), x.dtype) if self.wants_x else None
        self.grad_weight_N = weight.new_zeros(rows) if self.wants_weight else None

    def of(self, saved: list[Tensor]) -> list[Tensor | None]:
        """The gradients of x, weight, up, down and the biases."""
        plan = self.plan
        for strip, h_nH in zip(plan.strips, saved, strict=True):
            self._strip(strip, h_nH)
        grad_x = grad_weight = None
        if self.grad_x is not None:
            self.grad_x[plan.used :].zero_()
            grad_x = row_sums(self.grad_x, plan.row)
        if self.grad_weight_N is not None:
            taken = self.grad_weight_N.index_select(0, plan.row.view(-1))
            grad_weight = taken.view(self.weight.shape)
        return [grad_x, grad_weight, *self.grads]

    def _strip(self, strip: Strip, h_nH: Tensor) -> None:
        up, down, rows = self.networks.up, self.networks.down, strip.rows
        weight_n1 = self.weight_N1[rows]
        back_nO = self.plan.taken(self.grad, rows)  # of weighed results
        back_nF = batch_products(back_nO, down.transpose(1, 2), None, strip, training=True)
        hidden_nF, grad_nH = self._through_function(rows, h_nH, back_nF, weight_n1)
        weighed_nF = hidden_nF * weight_n1.to(hidden_nF.dtype)
        x_nD = self.plan.taken(self.x, rows)
        for batch in strip.batches:
            here = batch.after(rows.start)
            self._matrices(batch, back_nO[here], weighed_nF[here], grad_nH[here], x_nD[here])
            self._biases(batch, back_nO[here], grad_nH[here])
        if self.grad_x is not None:
            batch_products(
                grad_nH,
                up.transpose(1, 2),
                None,
                strip,
                out=self.grad_x[rows],
                training=True,
            )

    def _matrices(
        self, batch: Batch, back: Tensor, weighed: Tensor, grad_hidden: Tensor, x: Tensor
    ) -> None:
        grad_up, grad_down, *_ = self.grads
        if grad_down is not None:
            batch_outer(back, weighed, batch, grad_down)
        if grad_up is not None:
            batch_outer(grad_hidden, x, batch, grad_up)

    def _biases(self, batch: Batch, back: Tensor, grad_hidden: Tensor) -> None:
        down_bias, experts = self.networks.down_bias, batch.experts
        _, _, grad_up_bias, grad_down_bias = self.grads
        if grad_up_bias is not None:
            torch.sum(by_expert(grad_hidden, batch), 1, out=grad_up_bias[experts])
        if grad_down_bias is not None:
            weighed = (back * self.weight_N1[batch.rows]).to(back.dtype)
            torch.sum(by_expert(weighed, batch), 1, out=grad_down_bias[experts])
        if down_bias is not None and self.grad_weight_N is not None:
            found = by_expert(back, batch) @ down_bias[experts, :, None]
            self.grad_weight_N[batch.rows] += found.view(-1).to(self.grad_weight_N.dtype)

    def _through_function(
        self, rows: slice, h_nH: Tensor, back_nF: Tensor, weight_n1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The hidden units, computed again, and the gradient of what they are computed from."""
        grad_nF, function = back_nF * weight_n1.to(back_nF.dtype), self.networks.function
        if isinstance(function, SiluGate):
            value_nF, grad_nH = function.with_gradient(h_nH, grad_nF)
        else:
            with torch.enable_grad():
                leaf = h_nH.detach().requires_grad_()
                hidden_nF = function(leaf)
            value_nF = hidden_nF.detach()
            (grad_nH,) = torch.autograd.grad(hidden_nF, leaf, grad_nF)
        if self.grad_weight_N is not None:  # <back, down hidden> = <back down, hidden>
            self.grad_weight_N[rows] = (back_nF * value_nF).sum(1)
        return value_nF, grad_nH


def _gradient(tensor: Tensor, hit: list[int]) -> Tensor:
    """Memory for a stacked gradient in the layout of its parameter."""
    if tensor.dim() == 3 and tensor.stride(2) != 1:
        experts, rows, columns = tensor.shape
        return stacked_gradient((experts, columns, rows), tensor, hit).transpose(1, 2)
    return stacked_gradient(tensor.shape, tensor, hit)
