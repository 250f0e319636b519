"""Gradients over ranks: means without FSDP2, and one norm over all meshes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moezoo.errors import ConfigError
from moezoo.experts.base import Experts
from moezoo.functional.shards import is_divided, local_of
from moezoo.parallel.meshes import check_mesh
from moezoo.private_torch import flattened

_BUCKET = 1 << 25  # bytes per collective


@torch.no_grad()
def mean_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """After backward, make every gradient the one of the mean of all ranks' losses, in place.

    For a model after `expert_parallel` (under `shard` FSDP2 has done it): experts are averaged over
    the ranks that hold the same ones, all else over all ranks. A parameter that has no gradient
    here but on another rank counts as zero. Every rank must call it, after its last backward.

    Raises ConfigError for experts whose gradients are sums.
    """
    mesh = check_mesh(mesh)
    summing = [
        module
        for module in model.modules()
        if isinstance(module, Experts)
        and module.dispatcher
        and module.dispatcher.gradients == "sum"
    ]
    if summing:
        hint = 'Use gradients="mean".'
        raise ConfigError("the gradients of experts are sums", field="gradients", hint=hint)
    wanted = [p for p in model.parameters() if p.requires_grad]
    _average([p for p in wanted if not is_divided(p)], flattened(mesh).get_group())
    _average([p for p in wanted if is_divided(p)], mesh["dp"].get_group())


def _average(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    ranks = dist.get_world_size(group)
    if ranks == 1 or not parameters:
        return
    device = parameters[0].device
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX, group=group)
    for parameter, one_has in zip(parameters, has.tolist(), strict=True):
        if one_has and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [local_of(p.grad) for p in parameters if p.grad is not None]
    for bucket in _buckets(grads):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group)
        flat /= ranks
        parts = torch.split(flat, [grad.numel() for grad in bucket])
        for grad, part in zip(bucket, parts, strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Iterable[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, up to a size: one collective each."""
    found: list[list[Tensor]] = []
    room, dtype = 0, None
    for grad in grads:
        if grad.dtype != dtype or grad.nbytes > room:
            found.append([])
            room, dtype = _BUCKET, grad.dtype
        found[-1].append(grad)
        room -= grad.nbytes
    return found


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most `max_norm`.

    torch's `clip_grad_norm_` over any mixture of plain tensors and DTensors of any meshes (torch's
    own refuses two): squares are summed along the dimensions that a tensor is divided along, once
    per mesh, and then there is one root. Plain gradients must be equal on all ranks
    (`mean_gradients`). Where the norm is not finite, gradients stay as they are.

    Returns:
        The norm before, the same on every rank.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros(())
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(_divided_along(grad), []).append(local_of(grad))
    total = torch.stack([_squares(along, parts) for along, parts in by_mesh.items()]).sum()
    norm = total.sqrt()
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for parts in by_mesh.values():
        for part in parts:
            part.mul_(factor.to(part.device, part.dtype))
    return norm


def _divided_along(grad: Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """The mesh of a gradient and its dimensions that divide it. Raises ConfigError for one whose
    parts are still to be summed.
    """
    if not is_divided(grad):
        return None
    divided: Any = grad
    if any(placement.is_partial() for placement in divided.placements):
        found = str(divided.placements)
        raise ConfigError("a gradient is still to be summed over ranks", found=found)
    along = [i for i, placement in enumerate(divided.placements) if placement.is_shard()]
    return divided.device_mesh, tuple(along)


def _squares(along: tuple[DeviceMesh, tuple[int, ...]] | None, parts: list[Tensor]) -> Tensor:
    """The sum of squares of whole gradients, in float32 at least."""
    norms = [
        torch.linalg.vector_norm(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for p in parts
    ]
    total = torch.stack(norms).square().sum()
    if along is not None:
        mesh, dims = along
        for dim in dims:
            dist.all_reduce(total, group=mesh.get_group(dim))
    return total
