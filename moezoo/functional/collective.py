"""What the ranks of a distributed run exchange; in a run of one process, nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# By the names of torch 2.13, which calls the older ones deprecated.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(
    dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None)
)

_DATA_GROUP: list[dist.ProcessGroup] = []


def set_data_group(group: dist.ProcessGroup | None) -> None:
    """Say which ranks hold other tokens than this one, it included; None: all. A program's process
    groups are its own, and so is this.
    """
    _DATA_GROUP[:] = [] if group is None else [group]


def data_group() -> dist.ProcessGroup | None:
    """The ranks over whose tokens losses and statistics are summed; None stands for all ranks."""
    return _DATA_GROUP[0] if _DATA_GROUP else None


def is_distributed() -> bool:
    """Whether this process is a rank of a run of torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def rank_of_all() -> int:
    """The number of this process among all; 0 without torch.distributed."""
    return dist.get_rank() if is_distributed() else 0


def num_ranks() -> int:
    """How many processes train together (1 without torch.distributed)."""
    return dist.get_world_size(data_group()) if is_distributed() else 1


def node_size(otherwise: int) -> int:
    """How many ranks a node has, as torchrun says by `LOCAL_WORLD_SIZE`; `otherwise` without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", otherwise))


def rank() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank(data_group()) if is_distributed() else 0


def ranks_of_loss() -> int:
    """Over how many ranks a loss is taken: all while gradients are recorded, which all ranks do
    equally often, and otherwise this one, so that a rank may evaluate alone.
    """
    return num_ranks() if torch.is_grad_enabled() else 1


def summed_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient. Every rank must call it."""
    if num_ranks() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total, group=data_group())
    return total


def gathered_texts(text: str) -> list[str]:
    """What every rank says, by rank. Every rank must call it."""
    if not is_distributed():
        return [text]
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=_text_device())
    ranks = dist.get_world_size()
    size = content.new_tensor([content.shape[0]], dtype=torch.int64)
    sizes = size.new_empty(ranks)
    _all_gather(sizes, size)
    longest = max(int(sizes.max()), 1)
    padded = torch.cat([content, content.new_zeros(longest - content.shape[0])])
    everything = content.new_empty(ranks * longest)
    _all_gather(everything, padded)
    rows = everything.view(ranks, longest).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(rows, sizes.tolist(), strict=True)]


def _text_device() -> torch.device:
    """Where the default group takes tensors."""
    kinds = str(dist.get_backend())
    return torch.device("cuda" if "nccl" in kinds and "gloo" not in kinds else "cpu")


@dataclass
class Traffic:
    """Bytes that this rank sent to others for its experts, and in how many collectives."""

    rows: int = 0
    counts: int = 0
    calls: int = 0


_METERS: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what this process sends to the experts of other ranks while the block runs, backward
    and recomputation included: `.rows` and `.counts` in bytes, `.calls` in collectives.
    """
    meter = Traffic()
    _METERS.append(meter)
    try:
        yield meter
    finally:
        _METERS.remove(meter)


def exchanged_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row p of (ranks, n) goes to rank p; row p of the result came from it."""
    received = torch.empty_like(counts)
    _count("counts", counts.nbytes - counts[0].nbytes)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def exchanged_rows(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """The first sent[0] rows of x (N, D) go to rank 0, the next sent[1] to rank 1, ...; the result
    holds received[p] rows from rank p, in that order. Differentiable, twice too.

    Without a single row it is still part of the graph: the other ranks wait in backward.
    """
    out: Tensor = _AllToAll.apply(x, list(sent), list(received), group)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        elsewhere = sum(sent) - sent[dist.get_rank(group)]
        _count("rows", elsewhere * x[:1].nbytes if x.shape[0] else 0)
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = _AllToAll.apply(grad, ctx.received, ctx.sent, ctx.group)  # type: ignore[no-untyped-call]
        return back, None, None, None


def gathered_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(n,) of every rank: (ranks, n)."""
    ranks = dist.get_world_size(group)
    out = counts.new_empty(ranks * counts.shape[0])
    _count("counts", (ranks - 1) * counts.nbytes)
    _all_gather(out, counts.contiguous(), group=group)
    return out.view(ranks, -1)


def gathered_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows (N, D) of every rank, of which each has as many: (ranks * N, D). Differentiable,
    twice too: its gradient is `scattered_sum`, whose gradient it is.
    """
    out: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def scattered_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks * N, D) summed over the ranks: (N, D), this rank's part of the sum."""
    out: Tensor = _Scatter.apply(x, group)  # type: ignore[no-untyped-call]
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ranks = group, dist.get_world_size(group)
        out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        _count("rows", (ranks - 1) * x.nbytes)
        _all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ranks = group, dist.get_world_size(group)
        out = x.new_empty(x.shape[0] // ranks, *x.shape[1:])
        _count("rows", (ranks - 1) * out.nbytes)
        _reduce_scatter(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


def _count(kind: str, size: int) -> None:
    for meter in _METERS:
        setattr(meter, kind, getattr(meter, kind) + size)
        meter.calls += 1
