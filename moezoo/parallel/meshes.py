"""The mesh of a run: data parallelism times expert parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moezoo.errors import ConfigError
from moezoo.functional.collective import is_distributed, node_size
from moezoo.private_torch import flattened, share_timeout, unflattened

NAMES = ("dp", "ep")
_BY_NODE = ("copies", "node")


def mesh(ep: int | None = None, *, device: torch.device | str | None = None) -> DeviceMesh:
    """All ranks as a mesh ("dp", "ep"): those along "ep" hold different experts, those along "dp"
    the same ones, and every rank has tokens of its own. Every rank must call it.

    Args:
        ep: ranks that share one set of experts; None: all ranks of a node (torchrun's
            `LOCAL_WORLD_SIZE`; without torchrun, all ranks).
        device: its type; None: the accelerator, or "cpu" where there is none.

    Raises ConfigError outside a process group (`join` makes one), and for an `ep` that does not
    divide the ranks.
    """
    if not is_distributed():
        hint = "Start with torchrun, and call moezoo.parallel.join() first."
        raise ConfigError("there is no process group to make a mesh of", field="mesh", hint=hint)
    ranks = dist.get_world_size()
    if ep is None:
        ep = min(node_size(ranks), ranks)
    check_ep(ep, ranks)
    kind = torch.device(device).type if device is not None else _accelerator()
    made = init_device_mesh(kind, (ranks // ep, ep), mesh_dim_names=NAMES)
    share_timeout(made.get_all_groups(), kind)
    return made


def check_ep(ep: object, ranks: int) -> None:
    """Refuse ranks that share experts and do not divide all. Raises ConfigError."""
    if isinstance(ep, bool) or not isinstance(ep, int) or ep < 1 or ranks % ep:
        wanted = f"a divisor of {ranks} ranks"
        raise ConfigError("bad ep", field="ep", expected=wanted, found=repr(ep))


def check_mesh(mesh: object) -> DeviceMesh:
    """The mesh, if it has the dimensions "dp" and "ep". Raises ConfigError."""
    if not isinstance(mesh, DeviceMesh) or mesh.mesh_dim_names != NAMES:
        names = getattr(mesh, "mesh_dim_names", None)
        found = type(mesh).__name__ if names is None else names
        hint = 'Use moezoo.parallel.mesh(), or the part mesh["dp", "ep"] of a larger one.'
        raise ConfigError("not a mesh of data and experts", field="mesh", found=found, hint=hint)
    return mesh


def by_node(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks of a mesh ("dp", "ep") as one row per node: torchrun's `LOCAL_WORLD_SIZE`
    neighbours, or, where nobody says it, those along "ep". Every rank must call it.

    Raises ConfigError as `check_nodes` does.
    """
    shape = check_nodes(mesh.mesh.flatten().tolist(), node_size(mesh["ep"].size()))
    if mesh.shape == shape:
        return mesh
    made = unflattened(flattened(mesh), shape, _BY_NODE)
    share_timeout(made.get_all_groups(), mesh.device_type)
    return made


def check_nodes(ranks: Sequence[int], size: int) -> tuple[int, int]:
    """Over how many nodes of `size` ranks some ranks lie, and how many of them on each. Raises
    ConfigError unless there are several of both, equally many on each.
    """
    nodes = [rank // size for rank in ranks]
    runs = [len(list(run)) for _, run in groupby(nodes)]
    if len(runs) == 1 or runs[0] == 1 or set(runs) != {runs[0]} or len(set(nodes)) < len(runs):
        reason = "hybrid divides dense weights within a node and copies them beyond"
        wanted = "several ranks, equally many, on each of several nodes"
        found = f"nodes of {', '.join(map(str, runs))}"
        hint = "Leave it out: dense weights are then divided over all ranks."
        raise ConfigError(reason, field="hybrid", expected=wanted, found=found, hint=hint)
    return len(runs), runs[0]


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type
