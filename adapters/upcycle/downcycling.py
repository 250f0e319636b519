"""The dense checkpoint inside an upcycled one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import DecoderConfig, Family, ModelConfig, layout_for
from moezoo.adapters.families.decoders import constant_of
from moezoo.adapters.formats import Source, TensorInfo
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.formats.files import quoted
from moezoo.adapters.fused import place_of, whole_name
from moezoo.adapters.left_behind import known_aliases, known_names, known_strays
from moezoo.adapters.shapes import expert_width, matrix_names
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.decoders import dense_sibling
from moezoo.adapters.upcycle.inits import expert_inits
from moezoo.adapters.upcycle.preservation import preserving_scale
from moezoo.adapters.upcycle.rewrite import Output, copied, rewrite
from moezoo.adapters.upcycle.scaling import constant_bytes, scale_bytes
from moezoo.errors import ConfigError, TensorMismatch
from moezoo.registry import Spec

if TYPE_CHECKING:
    from torch import Tensor


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
        outputs = list(_restored(checkpoint, _outputs(checkpoint, family)))
        if out is None:
            return _whole({o.plan.name: _tensor(checkpoint.source, o) for o in outputs})
        return rewrite(
            checkpoint,
            out,
            outputs,
            config=config,
            family=family,
            operation={"operation": "downcycle"},
            overwrite=overwrite,
        )


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file holds them, with the matrices of a fused one joined."""
    import torch

    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        place = place_of(name)
        parts.setdefault(whole_name(name), {})[place.number if place else 0] = tensor
    return {
        name: torch.cat([held[i] for i in sorted(held)]) if len(held) > 1 else held[0]
        for name, held in parts.items()
    }


def dense_config(checkpoint: CheckpointSource) -> ModelConfig:
    """The config of the dense model. Raises ConfigError when the source is dense already."""
    config = checkpoint.config
    if isinstance(config, DecoderConfig) and config.decoder_sparse:
        return dense_sibling(config)
    if not (config.encoder_sparse or config.decoder_sparse):
        raise ConfigError("the model is dense already", field="source", path=checkpoint.path)
    return config.replace(  # type: ignore[no-any-return]
        num_experts=0, router="switch", capacity=None, experts="stacked", router_losses=None,
        router_bias=False, wo_scale=None,
    )  # fmt: skip


def upcycled_scale(checkpoint: CheckpointSource) -> float:
    """The factor on `wo` that was applied, else what exactness needs."""
    return applied_scale(checkpoint.config.replace(wo_scale=known_scale(checkpoint)))


def applied_scale(config: ModelConfig) -> float:
    """The factor on `wo` that a config tells, else what exactness needs of its router."""
    if config.wo_scale is not None:
        return config.wo_scale
    if isinstance(config, DecoderConfig) and config.sparse_kind is not None:
        return config.sparse_kind.routed
    router = Spec.parse(config.router, kind="router")
    return preserving_scale(expert_inits.build("copy"), router, config.num_experts, "exact")


def known_scale(checkpoint: CheckpointSource) -> float | None:
    """The factor on `wo` between the dense model and this one, if config or provenance tell it."""
    if checkpoint.config.wo_scale is not None:
        return checkpoint.config.wo_scale
    made = checkpoint.description.values.get("moezoo_provenance")
    if isinstance(checkpoint.config, DecoderConfig):
        made = _scaling(made)
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


def _scaling(made: Any) -> Any:
    """The provenance that tells the factor: of the upcycling, which what came after has kept."""
    while isinstance(made, Mapping) and "wo_scale" not in made:
        before = made.get("made_from")
        first = before[0] if isinstance(before, list) and len(before) == 1 else None
        made = first.get("provenance") if isinstance(first, Mapping) else None
    return made


def _restored(checkpoint: CheckpointSource, outputs: Iterator[Output]) -> Iterator[Output]:
    """The outputs by the names that the dense source had, with its aliases and its strays."""
    names = known_names(checkpoint)
    for output in copied(outputs, known_aliases(checkpoint)):
        name = names.get(output.plan.name, output.plan.name)
        yield replace(output, plan=replace(output.plan, name=name))
    for plan, content in known_strays(checkpoint).values():
        yield Output(plan, make=partial(bytes, content))


def _outputs(checkpoint: CheckpointSource, family: Family) -> Iterator[Output]:
    config, scale = checkpoint.config, upcycled_scale(checkpoint)
    for name, parts in checkpoint.tensors.items():
        layer, found, rest = name.rpartition(".mlp.")
        if found and rest.startswith("router."):
            if not rest.startswith("router.classifier.weight"):
                check_untrained(checkpoint.source, parts[0])
            continue
        if value := constant_of(config, name):
            check_untrained(checkpoint.source, parts[0], value)
            continue
        if found and rest.startswith("shared."):
            continue  # compared with the experts below
        if not found or not rest.startswith("experts."):
            (target,) = family.disk_names(name)
            yield Output(TensorPlan(target, parts[0].dtype, parts[0].shape), parts[0])
            continue
        matrix = rest.removeprefix("experts.")
        (target,) = family.disk_names(f"{layer}.mlp.{matrix}.weight")
        shared = checkpoint.tensors.get(f"{layer}.mlp.shared.{matrix}.weight", (None,))[0]
        factor = scale if matrix == "wo" else 1.0
        yield _dense_matrix(checkpoint, target, matrix, parts, shared, factor)


def _dense_matrix(
    checkpoint: CheckpointSource,
    target: str,
    matrix: str,
    parts: tuple[TensorInfo, ...],
    shared: TensorInfo | None,
    scale: float,
) -> Output:
    config, undo = checkpoint.config, 1.0 / scale
    assert matrix in matrix_names(config)
    slices = slices_of(checkpoint)
    copies = len(parts) // slices
    for first in range(0, len(parts), copies):
        for part in parts[first + 1 : first + copies]:
            if not _equals(checkpoint.source, part, parts[first]):
                raise _differs(checkpoint, parts[first], part)
    shape = (config.d_model, config.d_ff) if matrix == "wo" else (config.d_ff, config.d_model)
    plan = TensorPlan(target, parts[0].dtype, shape)
    if shared is not None and _is_dense(checkpoint, matrix, parts[::copies], shared, scale):
        return Output(plan, shared)
    exact = undo == 1.0 or math.frexp(undo)[0] == 0.5
    if slices == 1 and exact:
        return Output(plan, parts[0], undo)

    def joined() -> memoryview:
        whole = _joined(checkpoint.source, parts[::copies], matrix)
        return tensor_bytes(whole if undo == 1.0 else whole / scale)

    return Output(plan, make=joined)


def slices_of(checkpoint: CheckpointSource) -> int:
    """Into how many experts a dense layer was cut; 1: each is whole. Raises ConfigError where they
    are of a width that no cut gives, as in models that were no dense ones.
    """
    config = checkpoint.config
    width = expert_width(config)
    slices, rest = divmod(config.d_ff, width)
    if rest or not slices or config.num_experts % slices:
        raise ConfigError(
            f"no dense model has its layers: {config.num_experts} experts are {width} wide, "
            f"and a dense MLP {config.d_ff}", field="source", path=checkpoint.path,
        )  # fmt: skip
    return slices


def _joined(source: Source, parts: Sequence[TensorInfo], matrix: str) -> Tensor:
    import torch

    return torch.cat([source.tensor(part.name) for part in parts], dim=1 if matrix == "wo" else 0)


def check_untrained(source: Source, info: TensorInfo, value: float = 0.0) -> None:
    """Raise TensorMismatch for what an upcycling has made `value` and is not any more."""
    for chunk in source.chunks(info.name):
        if bytes(chunk) != constant_bytes(info.dtype, len(chunk), value):
            raise _trained(source, info, value)


def _trained(source: Source, info: TensorInfo, value: float) -> TensorMismatch:
    return TensorMismatch(
        f"{quoted(info.name)} is not {value:g}: it was trained",
        path=source.path,
        key=info.name,
        hint="A dense model has no place for it.",
    )


def _is_dense(
    checkpoint: CheckpointSource,
    matrix: str,
    parts: Sequence[TensorInfo],
    shared: TensorInfo,
    scale: float,
) -> bool:
    """Whether what every token passes is the dense matrix itself, and not scaled like the experts.

    Raises TensorMismatch where it is not the layer that the experts are, or slices of.
    """
    config, source = checkpoint.config, checkpoint.source
    assert isinstance(config, DecoderConfig) and config.sparse_kind is not None
    scaled = config.sparse_kind.shared_scale if matrix == "wo" else 1.0
    for held in dict.fromkeys((1.0, scaled)):
        # What was rounded is the expert: in float16 a small weight's half has no bit for its last.
        if len(parts) == 1:
            same = _equals(source, parts[0], shared, scale / held)
        else:
            whole = source.tensor(shared.name) * (scale / held)
            same = whole.equal(_joined(source, parts, matrix))
        if same:
            return held == 1.0
    raise _differs(checkpoint, parts[0], shared)


def _equals(source: Source, info: TensorInfo, of: TensorInfo, scale: float = 1.0) -> bool:
    """Whether a tensor is another one, scaled."""
    return (info.dtype, info.shape) == (of.dtype, of.shape) and all(
        ours == scale_bytes(theirs, of.dtype, scale)
        for ours, theirs in zip(source.chunks(info.name), source.chunks(of.name), strict=True)
    )


def _differs(checkpoint: CheckpointSource, one: TensorInfo, other: TensorInfo) -> TensorMismatch:
    shares = isinstance(checkpoint.config, DecoderConfig) and checkpoint.config.shares
    hint = "" if shares else " `moezoo export --expert N` takes one."
    return TensorMismatch(
        f"the experts differ: {quoted(one.name)} and {quoted(other.name)}",
        path=checkpoint.path,
        key=other.name,
        hint=f"It was trained, merged, or not copied.{hint}",
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
