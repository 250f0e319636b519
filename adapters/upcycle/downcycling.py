"""The dense checkpoint inside an upcycled one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import layout_for
from moezoo.adapters.formats import Source, TensorInfo
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.formats.files import quoted
from moezoo.adapters.left_behind import known_aliases, known_names, known_strays
from moezoo.adapters.names import disk_names
from moezoo.adapters.shapes import expert_width, matrix_names
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.inits import expert_inits
from moezoo.adapters.upcycle.preservation import preserving_scale
from moezoo.adapters.upcycle.rewrite import Output, copied, rewrite
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, TensorMismatch
from moezoo.registry import Spec


def downcycle_checkpoint(
    path: str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> Any:
    """The dense model that an upcycled checkpoint was made from; byte-identical where its scale is
    a power of two.

    Args:
        out: the directory to write, whose path is returned; None returns the tensors by their
            names on disk.

    Raises TensorMismatch naming a layer whose experts differ, ConfigError for a dense source.
    """
    with open_checkpoint(path) as checkpoint:
        config = dense_config(checkpoint)
        family = layout_for(config)
        outputs = list(_restored(checkpoint, _outputs(checkpoint, family.mlp)))
        if out is None:
            return {o.plan.name: _tensor(checkpoint.source, o) for o in outputs}
        return rewrite(
            checkpoint,
            out,
            outputs,
            config=config,
            family=family,
            operation={"operation": "downcycle"},
            overwrite=overwrite,
        )


def dense_config(checkpoint: CheckpointSource) -> SwitchConfig:
    """The config of the dense model. Raises ConfigError when the source is dense already."""
    config = checkpoint.config
    if not (config.encoder_sparse or config.decoder_sparse):
        raise ConfigError("the model is dense already", field="source", path=checkpoint.path)
    return config.replace(
        num_experts=0, router="switch", capacity=None, experts="stacked", router_losses=None,
        router_bias=False, wo_scale=None,
    )  # fmt: skip


def upcycled_scale(checkpoint: CheckpointSource) -> float:
    """The factor on `wo` that was applied, else what exactness needs."""
    return applied_scale(checkpoint.config.replace(wo_scale=known_scale(checkpoint)))


def applied_scale(config: SwitchConfig) -> float:
    """The factor on `wo` that a config tells, else what exactness needs of its router."""
    if config.wo_scale is not None:
        return config.wo_scale
    router = Spec.parse(config.router, kind="router")
    return preserving_scale(expert_inits.build("copy"), router, config.num_experts, "exact")


def known_scale(checkpoint: CheckpointSource) -> float | None:
    """The factor on `wo` between the dense model and this one, if config or provenance tell it."""
    if checkpoint.config.wo_scale is not None:
        return checkpoint.config.wo_scale
    made = checkpoint.description.values.get("moezoo_provenance")
    scale = made.get("wo_scale") if isinstance(made, Mapping) else None
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < 1e9:
        raise ConfigError(
            "moezoo_provenance.wo_scale is no factor",
            field="wo_scale",
            path=checkpoint.source.directory / "config.json",
            found=repr(scale)[:80],
        )
    return float(scale)


def _restored(checkpoint: CheckpointSource, outputs: Iterator[Output]) -> Iterator[Output]:
    """The outputs by the names that the dense source had, with its aliases and its strays."""
    names = known_names(checkpoint)
    for output in copied(outputs, known_aliases(checkpoint)):
        name = names.get(output.plan.name, output.plan.name)
        yield replace(output, plan=replace(output.plan, name=name))
    for plan, content in known_strays(checkpoint).values():
        yield Output(plan, make=partial(bytes, content))


def _outputs(checkpoint: CheckpointSource, mlp: str) -> Iterator[Output]:
    config, scale = checkpoint.config, upcycled_scale(checkpoint)
    for name, parts in checkpoint.tensors.items():
        layer, found, rest = name.rpartition(".mlp.")
        if found and rest.startswith("router."):
            continue
        if not found or not rest.startswith("experts."):
            (target,) = disk_names(name, mlp=mlp)
            yield Output(TensorPlan(target, parts[0].dtype, parts[0].shape), parts[0])
            continue
        matrix = rest.removeprefix("experts.")
        (target,) = disk_names(f"{layer}.mlp.{matrix}.weight", mlp=mlp)
        undo = 1.0 / scale if matrix == "wo" else 1.0
        yield _dense_matrix(checkpoint, config, target, matrix, parts, undo)


def _dense_matrix(
    checkpoint: CheckpointSource,
    config: SwitchConfig,
    target: str,
    matrix: str,
    parts: tuple[TensorInfo, ...],
    undo: float,
) -> Output:
    slices = config.d_ff // expert_width(config)
    assert matrix in matrix_names(config)
    copies = len(parts) // slices
    for first in range(0, len(parts), copies):
        for part in parts[first + 1 : first + copies]:
            _check_equal(checkpoint.source, parts[first], part)
    shape = (config.d_model, config.d_ff) if matrix == "wo" else (config.d_ff, config.d_model)
    plan = TensorPlan(target, parts[0].dtype, shape)
    exact = undo == 1.0 or math.frexp(undo)[0] == 0.5
    if slices == 1 and exact:
        return Output(plan, parts[0], undo)

    def joined() -> memoryview:
        import torch

        chosen = [checkpoint.source.tensor(part.name) for part in parts[::copies]]
        whole = torch.cat(chosen, dim=1 if matrix == "wo" else 0)
        return tensor_bytes(whole if undo == 1.0 else whole / (1.0 / undo))

    return Output(plan, make=joined)


def _check_equal(source: Source, one: TensorInfo, other: TensorInfo) -> None:
    for ours, theirs in zip(source.chunks(one.name), source.chunks(other.name), strict=True):
        if ours != theirs:
            raise TensorMismatch(
                f"the experts differ: {quoted(one.name)} and {quoted(other.name)}",
                path=source.path,
                key=other.name,
                hint="It was trained, or not copied; `moezoo export --expert N` takes one.",
            )


def _tensor(source: Source, output: Output) -> Any:
    import torch

    from moezoo.adapters.formats.base import torch_dtype

    if output.info is not None:
        tensor = source.tensor(output.info.name)
        return tensor.clone() if output.scale == 1.0 else tensor * output.scale
    assert output.make is not None
    content = torch.frombuffer(bytearray(output.make()), dtype=torch_dtype(output.plan.dtype))
    return content.view(output.plan.shape)
