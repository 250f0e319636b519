"""FSDP2 around experts that are divided already: every rank holds its share of everything."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from moezoo.dtypes import as_dtype
from moezoo.errors import ConfigError
from moezoo.experts import StackedExperts
from moezoo.functional.shards import is_divided, is_sharded
from moezoo.models.block import Block
from moezoo.models.norm import RMSNorm
from moezoo.parallel.meshes import by_node, check_mesh
from moezoo.parallel.style import expert_parallel
from moezoo.private_torch import flattened
from moezoo.routers.base import Router

_HALVES = (torch.bfloat16, torch.float16)


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    precision: torch.dtype | str | None = None,
    reshard: bool = True,
    hybrid: bool = False,
) -> nn.Module:
    """Divide a moezoo model among all ranks: experts by `expert_parallel`, then FSDP2 by block.

    A rank holds E / ep experts of each layer, and of each its part over "dp" (Shard(1)); of all
    else its part over all ranks (Shard(0)). Gradients come out as means over all ranks. `generate`
    works; every rank must call it. On one rank, without a precision, the model stays as it is.

    Args:
        model: of `moezoo.build` or `moezoo.load`, also on "meta"; changed in place. Its experts may
            be divided already, along the same mesh.
        precision: torch.bfloat16 or torch.float16 for products and activations; weights, their
            gradients, and all that routers and norms compute with stay as they are (selective
            precision, 2101.03961, section 2.4). None: everything stays.
        reshard: give a block's gathered weights back after its forward, and gather them again in
            backward: less memory, half as much traffic again.
        hybrid: what is no expert is divided within a node alone, with a copy for every node
            (HSDP): more memory, and of dense weights only gradients travel between nodes. A node
            is as many neighbours as torchrun's `LOCAL_WORLD_SIZE`, or those along "ep".

    Returns:
        The model.

    Raises ConfigError for a model that is not moezoo's or is under FSDP already, for `hybrid` on
    one node or with one rank on each, and as `expert_parallel` does.
    """
    mesh = check_mesh(mesh)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError("the model is sharded already", field="model", found=type(model).__name__)
    if not blocks:
        hint = "Divide its experts with expert_parallel, and the rest with torch's fully_shard."
        found = type(model).__name__
        raise ConfigError("not a T5 or Switch model", field="model", found=found, hint=hint)
    precision = as_dtype(precision)
    if precision is not None and precision not in _HALVES:
        wanted = " or ".join(map(str, _HALVES))
        raise ConfigError("bad precision", field="precision", expected=wanted, found=precision)
    # Of two dimensions: copies, then parts.
    everyone = by_node(mesh) if hybrid else flattened(mesh)
    if mesh["ep"].size() > 1:
        _check_widths(model, mesh["dp"].size())
    if not is_sharded(model) and any(block.sparse for block in blocks):
        expert_parallel(model, mesh)
    if mesh.size() == 1 and precision is None:
        return model
    aside = _shard_experts(model, mesh, precision, reshard)
    options: dict[str, Any] = {"mesh": everyone, "ignored_params": aside}
    policy = _policy(precision)
    for block in blocks:
        if precision is not None:
            fully_shard(_kept_wide(block), reshard_after_forward=reshard, mesh=everyone)
        fully_shard(block, reshard_after_forward=reshard, mp_policy=policy, **options)
    if precision is not None:
        for module in list(model.modules()):
            if isinstance(module, RMSNorm) and not isinstance(module, FSDPModule):
                fully_shard(module, mesh=everyone)
    fully_shard(model, mp_policy=policy, **options)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    return model


def _shard_experts(
    model: nn.Module, mesh: DeviceMesh, precision: torch.dtype | None, reshard: bool
) -> set[nn.Parameter]:
    """FSDP2 over "dp" for stacks that are divided along "ep"; those that it has no work for."""
    aside: set[nn.Parameter] = set()
    for module in list(model.modules()):
        if type(module) is not StackedExperts or not is_divided(module.wo):
            continue
        if mesh["dp"].size() == 1 and precision is None:  # a copy for nothing
            aside.update(module.parameters())
            continue
        fully_shard(
            module,
            mesh=mesh["dp"],
            # Not along the experts again: a dimension that is divided twice is no slice.
            shard_placement_fn=partial(_slice, mesh["dp"].size()),
            mp_policy=_policy(precision),
            reshard_after_forward=reshard,
        )
    return aside


def _check_widths(model: nn.Module, ranks: int) -> None:
    for module in model.modules():
        if isinstance(module, StackedExperts):
            for stack in module.parameters(recurse=False):
                _slice(ranks, stack)


def _slice(ranks: int, stack: nn.Parameter) -> Shard:
    """The width along which a stack is cut. Raises ConfigError where the ranks divide neither."""
    dim = next((d for d in range(1, stack.dim()) if stack.shape[d] % ranks == 0), None)
    if dim is None:
        wanted, found = f"a multiple of {ranks}", tuple(stack.shape[1:])
        reason = "the ranks along dp divide neither width of an expert"
        raise ConfigError(reason, field="d_ff", expected=wanted, found=found)
    return Shard(dim)


def _policy(precision: torch.dtype | None) -> MixedPrecisionPolicy:
    if precision is None:
        return MixedPrecisionPolicy()
    # Sums over many ranks lose more in half precision than anything else does.
    return MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)


def _kept_wide(block: Block) -> list[nn.Module]:
    """The norms of a block and its router, if that has weights."""
    parts = [module for module in block.modules() if isinstance(module, (RMSNorm, Router))]
    return [part for part in parts if next(part.parameters(), None) is not None]
