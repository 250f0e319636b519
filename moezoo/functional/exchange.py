"""Rows to the ranks that own their experts, and back (GShard, arXiv 2006.16668, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moezoo.functional.collective import exchanged_counts, exchanged_rows


@dataclass(frozen=True)
class Exchange:
    """Which rows go where, R ranks of E / R experts each.

    Fields: counts (E / R,), rows for each expert of this rank, from all ranks; sent, received: rows
    by rank; order, inverse (M,): rows as they arrive, by rank and then expert, in the order of
    `counts`, and back. Within an expert the rows of rank 0 come first: the order of the joint
    batch, in which sums of gradients have the bits of one process.
    """

    group: dist.ProcessGroup
    counts: Tensor
    sent: list[int]
    received: list[int]
    order: Tensor
    inverse: Tensor

    @staticmethod
    def of(counts: Tensor, group: dist.ProcessGroup) -> Exchange:
        """For rows by expert (E,) of this rank. The host waits for the counts, once."""
        ranks = dist.get_world_size(group)
        counts_RE = counts.view(ranks, -1)
        came_RE = exchanged_counts(counts_RE, group)
        sent, received = torch.stack([counts_RE.sum(1), came_RE.sum(1)]).tolist()
        expert_RE = torch.arange(came_RE.shape[1], device=counts.device).expand_as(came_RE)
        expert_M = expert_RE.reshape(-1).repeat_interleave(
            came_RE.view(-1), output_size=sum(received)
        )
        order = expert_M.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        return Exchange(group, came_RE.sum(0), sent, received, order, inverse)

    def to_owners(self, slots: Tensor) -> Tensor:
        """Rows (N, D), sorted by expert, of this rank -> rows (M, D) for its experts, sorted by
        expert. Rows past the counts stay.
        """
        total = sum(self.sent)
        used = slots if total == slots.shape[0] else slots[:total]
        came = exchanged_rows(used, self.sent, self.received, self.group)
        return permuted(came, self.order, self.inverse)

    def to_senders(self, rows: Tensor, num_rows: int) -> Tensor:
        """The results (M, D') of `to_owners` -> (N, D'), zero in rows past the counts."""
        leaving = permuted(rows, self.inverse, self.order)
        back = exchanged_rows(leaving, self.received, self.sent, self.group)
        missing = num_rows - back.shape[0]
        return torch.cat([back, back.new_zeros(missing, back.shape[1])]) if missing else back


def permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order; its gradient gathers too, where that of `index_select` adds."""
    out: Tensor = _Permute.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None  # type: ignore[no-untyped-call]


def gradient_scaled(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor`.

    Around experts, `factor` before and 1 / `factor` after them scale the gradients of their weights
    and of nothing else, without a copy of one. A second derivative takes the first one as it is:
    there too the weights alone are scaled, once.
    """
    out: Tensor = x if factor == 1.0 else _GradientScale.apply(x, factor)  # type: ignore[no-untyped-call]
    return out


class _GradientScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scaled.apply(grad, ctx.factor), None  # type: ignore[no-untyped-call]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, factor: float) -> Tensor:
        return grad * factor

    @staticmethod
    def backward(ctx: Any, again: Tensor) -> tuple[Tensor, None]:
        return again, None
