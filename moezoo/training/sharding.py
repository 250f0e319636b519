"""A run's model over its ranks."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moezoo.adapters.checkpoint import load, read_config
from moezoo.config import SwitchConfig
from moezoo.functional.collective import node_size, num_ranks
from moezoo.functional.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PRECISIONS = {None: None, "bfloat16": torch.bfloat16}


def over_ranks(
    model: nn.Module,
    *,
    ep: int | None = None,
    precision: str | None = None,
    hybrid: bool = False,
) -> nn.Module:
    """A model divided among all ranks, experts along `ep` of them; in one process, or where it is
    divided already, as it is.

    Args:
        ep: ranks that share one set of experts; None: the most of a node that divide the experts.
        precision: None or "bfloat16"; see `moezoo.parallel.shard`.
        hybrid: divide dense weights within a node alone, as there.

    Raises ConfigError for an `ep` that divides neither ranks nor experts, for experts that cannot
    be divided, and for `hybrid` on one node.
    """
    if num_ranks() == 1 or is_sharded(model):
        return model
    from moezoo.parallel import shard

    config: Any = model.config
    mesh = _mesh(config, ep, next(model.parameters()).device)
    return shard(model, mesh, precision=_PRECISIONS[precision], hybrid=hybrid)


def load_over_ranks(
    path: str,
    *,
    device: str,
    ep: int | None = None,
    precision: str | None = None,
    hybrid: bool = False,
    **overrides: Any,
) -> nn.Module:
    """A checkpoint's model, of which every rank reads its own part; see `over_ranks`."""
    options: dict[str, Any] = {"task": "conditional_generation", "device": device}
    if num_ranks() > 1:
        config = read_config(path).replace(**overrides)
        options["mesh"] = _mesh(config, ep, torch.device(device))
        options |= {"precision": _PRECISIONS[precision], "hybrid": hybrid}
    model: nn.Module = load(path, **options, **overrides)
    return model


def _mesh(config: SwitchConfig, ep: int | None, device: torch.device) -> DeviceMesh:
    from moezoo.parallel import mesh

    # Nobody here changes in place what a block returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if ep is None:
        ep = math.gcd(config.num_experts or 1, node_size(num_ranks()))
    return mesh(ep, device=device)
