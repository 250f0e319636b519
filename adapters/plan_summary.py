"""A plan in numbers: groups of like tensors, totals, and what it will cost on this machine."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.families.decoders import constant_of
from moezoo.adapters.fused import whole_name
from moezoo.adapters.plan import Move, Plan
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.carried import carried_files, other_files

_BASE_MEMORY = 32 << 20  # the interpreter, headers and buffers, as measured
_TORCH_MEMORY = 230 << 20
_SAMPLE = 16 << 20


def summary(plan: Plan, checkpoint: CheckpointSource) -> dict[str, Any]:
    """Everything that `moezoo plan` prints, as plain JSON values."""
    speed = disk_speed(checkpoint.source.directory)
    return {
        "source": str(checkpoint.path),
        "container": checkpoint.source.kind,
        "recipe": plan.recipe.to_dict(),
        "groups": _groups(plan),
        "left_out": dict(plan.left_out),
        "carried": carried_files(checkpoint.source.directory),
        "not_carried": other_files(checkpoint.source),
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "streams": plan.streams,
        "peak_memory": peak_memory(plan),
        "disk_bytes_per_second": round(speed),
        "seconds": round((plan.bytes_read + plan.bytes_written) / speed, 3),
        "expressible": plan.expressible,
        "layout": plan.family.model_types[0],
        "layout_reason": plan.layout_reason,
        "router": plan.config.router,
        "router_choice": plan.router_choice,
        "wo_scale": plan.scale,
        "encoder_sparse_layers": list(plan.config.encoder_sparse),
        "decoder_sparse_layers": list(plan.config.decoder_sparse),
    }


def peak_memory(plan: Plan) -> int:
    """Bytes of memory that the conversion needs at most, whatever the size of the model."""
    if plan.streams:
        return _BASE_MEMORY
    layer = max((4 * move.source.numel for move in plan.moves if move.layer is not None), default=0)
    if plan.router_init.needs_inputs:
        return _TORCH_MEMORY + 2 * plan.bytes_read
    return _TORCH_MEMORY + 8 * layer


def disk_speed(directory: Path) -> float:
    """Bytes per second that the disk takes just now, by writing and flushing a small file."""
    place = directory if os.access(directory, os.W_OK) else Path(tempfile.gettempdir())
    content = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=place) as file:
        started = time.monotonic()
        for _ in range(_SAMPLE // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _SAMPLE / max(time.monotonic() - started, 1e-6)


def _groups(plan: Plan) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for move in plan.moves:
        source, target = _pattern(move.source.name), _pattern(move.targets[0].name)
        init = _init(plan, move)
        key = (source, move.source.dtype, move.source.shape, target, init, move.scale)
        group = groups.setdefault(
            key,
            {
                "source": source,
                "target": target,
                "dtype": move.source.dtype,
                "shape": list(move.source.shape),
                "init": init,
                "scale": move.scale,
                "count": 0,
                "bytes_read": 0,
                "bytes_written": 0,
            },
        )
        group["count"] += 1
        group["bytes_read"] += move.source.nbytes
        group["bytes_written"] += sum(target.nbytes for target in move.written)
    return [*groups.values(), *_router_groups(plan)]


def _router_groups(plan: Plan) -> list[dict[str, Any]]:
    routers: dict[str, list[TensorPlan]] = {}
    fixed = {p.name: constant_of(plan.config, p.name) for c in plan.constants.values() for p in c}
    constants = (plan for layer in plan.constants.values() for plan in layer)
    drawn = {_pattern(router.name) for router in plan.routers.values()}
    for router in (*plan.routers.values(), *constants):
        routers.setdefault(_pattern(router.name), []).append(router)
    return [
        {
            "source": "-",
            "target": pattern,
            "dtype": alike[0].dtype,
            "shape": list(alike[0].shape),
            "init": _name(plan.recipe.router_init)
            if pattern in drawn
            else f"all {fixed[alike[0].name]:g}",
            "scale": 1.0,
            "count": len(alike),
            "bytes_read": 0,
            "bytes_written": sum(router.nbytes for router in alike),
        }
        for pattern, alike in routers.items()
    ]


def _init(plan: Plan, move: Move) -> str:
    return "-" if move.layer is None else _name(plan.recipe.init)


def _name(spec: str | dict[str, Any] | None) -> str:
    if spec is None or isinstance(spec, str):
        return spec or "-"
    options = ",".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}:{options}" if options else str(spec["name"])


def _pattern(name: str) -> str:
    """A name with its numbers of layer and expert made general."""
    name = re.sub(r"\b(block|layers|experts)\.\d+\b", r"\1.*", whole_name(name))
    return re.sub(r"expert_\d+", "expert_*", name)
