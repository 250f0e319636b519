"""Loading any supported checkpoint into a model, and saving a model all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from moezoo.adapters.checkpoint_source import task_of
from moezoo.adapters.description import Description, describe
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.base import Source
from moezoo.adapters.generation import read_generation
from moezoo.adapters.names import HEAD, disk_names
from moezoo.adapters.plugged import load_plugged, read_plugged
from moezoo.adapters.saving import refuse_beside_plugged
from moezoo.adapters.saving import save as save
from moezoo.building import TASKS, build, usable_device
from moezoo.config import SwitchConfig
from moezoo.dtypes import as_dtype
from moezoo.errors import ConfigError, NonFiniteWeights, TensorMismatch, did_you_mean
from moezoo.functional.shards import (
    Part,
    divided_like,
    part_of,
)
from moezoo.models import SwitchEncoderModel, SwitchForConditionalGeneration, SwitchModel
from moezoo.ops.memory import large_empty

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@overload
def load(
    path: str | Path,
    *,
    task: Literal["conditional_generation"],
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    allow_nonfinite: bool = ...,
    drop_heads: bool = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> SwitchForConditionalGeneration: ...


@overload
def load(
    path: str | Path,
    *,
    task: Literal["model"],
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    allow_nonfinite: bool = ...,
    drop_heads: bool = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> SwitchModel: ...


@overload
def load(
    path: str | Path,
    *,
    task: Literal["encoder"],
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    allow_nonfinite: bool = ...,
    drop_heads: bool = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> SwitchEncoderModel: ...


@overload
def load(
    path: str | Path,
    *,
    task: str | None = ...,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    allow_nonfinite: bool = ...,
    drop_heads: bool = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> Any: ...


def load(
    path: str | Path,
    *,
    task: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    allow_nonfinite: bool = False,
    drop_heads: bool = False,
    mesh: DeviceMesh | None = None,
    precision: torch.dtype | str | None = None,
    hybrid: bool = False,
    **overrides: Any,
) -> Any:
    """Load a T5-family or Switch checkpoint, dense or sparse, or a model of transformers that
    `moezoo.plug` has put experts into and `save` wrote; in evaluation mode.

    Weights are mapped from the file and read once. The experts of a layer are one view of the file
    where they lie there in a row, as moezoo writes them, and else go straight into their stack.

    Args:
        path: a directory, weight file or shard index; safetensors or PyTorch .bin, single or
            sharded (a .bin is read with `weights_only=True` and nothing else).
        task: "conditional_generation", "model" or "encoder"; None: what the checkpoint holds.
        device, dtype: where to and in which precision ("bfloat16" as well as torch.bfloat16); None:
            CPU, as stored.
        allow_nonfinite: accept NaN and infinity in weights.
        drop_heads: leave out heads that moezoo's models do not have, such as a classifier's; they
            are refused otherwise.
        mesh: of `moezoo.parallel.mesh`: the model as `moezoo.parallel.shard` makes it, of which a
            rank reads and holds its own part alone. Every rank must call it.
        precision, hybrid: with a mesh, what products compute in, and whether dense weights are
            divided within a node alone; see `moezoo.parallel.shard`.
        overrides: fields of SwitchConfig that change no shape, such as `capacity="transformers"`.

    Raises CheckpointError (CorruptFile, IndexFileError, TensorMismatch, NonFiniteWeights,
    UnsafeCheckpoint) or ConfigError, naming file, tensor or field.
    """
    device = None if device is None else usable_device(device)
    kind = as_dtype(dtype)
    if read_plugged(path) is not None:
        others = {"task": task, "drop_heads": drop_heads, "mesh": mesh, "precision": precision}
        refuse_beside_plugged(**others, hybrid=hybrid, **overrides)
        return load_plugged(path, device=device, dtype=kind)
    with open_source(path) as source:
        description = describe(source, drop_heads=drop_heads)
        config = description.config.replace(**overrides)
        chosen = _task(task, description)
        over: dict[str, Any] = {"mesh": mesh, "precision": precision, "hybrid": hybrid}
        model = build(config, task=chosen, device="meta", **over)
        if mesh is not None and device is None:
            device = usable_device(mesh.device_type)
        tensors = _Tensors(source, description, device, kind, allow_nonfinite)
        _fill(model, tensors, chosen)
        if isinstance(model, SwitchForConditionalGeneration):
            stored = read_generation(source.directory, description.values)
            said = {name: overrides[name] for name in stored.values if name in overrides}
            model.generation = stored.replace(**said)
    return model.eval()


def read_config(path: str | Path) -> SwitchConfig:
    """The config of a checkpoint; reads headers only. Raises as `load` does."""
    with open_source(path) as source:
        config: SwitchConfig = describe(source).config
        return config


@dataclass(frozen=True)
class _Tensors:
    """Tensors of a checkpoint, checked and converted on their way."""

    source: Source
    description: Description
    device: torch.device | str | None
    dtype: torch.dtype | None
    allow_nonfinite: bool

    def get(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        floating: bool = True,
        part: Part | None = None,
    ) -> Tensor:
        """The tensor called `name` (without the prefix), or a part, as stored. Raises
        TensorMismatch.
        """
        full = self._full_name(name, shape)
        tensor = self.source.tensor(full).view(shape)
        tensor = tensor if part is None else part.taken(tensor)
        if tensor.is_floating_point() != floating:
            info = self.source.info(full)
            kind = "floating" if floating else "an integer"
            reason = f"{full} is not {kind}"
            raise TensorMismatch(reason, path=self.source.path, key=full, found=info.dtype)
        if not self.allow_nonfinite and tensor.is_floating_point() and not _is_finite(tensor):
            hint = "Pass allow_nonfinite=True to load it all the same."
            reason = f"{full} holds NaN or infinity"
            raise NonFiniteWeights(reason, path=self.source.path, key=full, hint=hint)
        return tensor

    def stack(self, names: Sequence[str], shape: tuple[int, ...], part: Part) -> Tensor | None:
        """Tensors of `shape`, or a part of each, as one that needs no copy, or None: then each
        tells what is wrong.
        """
        whole = self.source.stack([self._full_name(name, shape) for name in names])
        if whole is None or not whole.is_floating_point():
            return None
        whole = Part((0, *part.offsets), (len(names), *part.sizes)).taken(whole)
        if not self.allow_nonfinite and not _is_finite(whole):
            return None
        return self.placed(whole)

    def _full_name(self, name: str, shape: tuple[int, ...]) -> str:
        full = self.description.prefix + name
        info = self.source.info(full)
        learned_number = shape == (1,) and info.shape == ()  # as routers once kept theirs
        if info.shape != shape and not learned_number:
            raise TensorMismatch(
                f"{full} has the wrong shape",
                path=self.source.path,
                key=full,
                expected=shape,
                found=info.shape,
                hint="config.json does not belong to these weights, or an override changes shapes.",
            )
        return full

    def placed(self, tensor: Tensor, *, cast: bool = True) -> Tensor:
        """On the wanted device and in the wanted dtype; no copy when it is there already. A buffer
        is not cast: its module knows which precision its steps need.
        """
        wanted = self.dtype if cast and tensor.is_floating_point() else None
        return tensor.to(device=self.device or "cpu", dtype=wanted or tensor.dtype)


def _fill(model: nn.Module, tensors: _Tensors, task: str) -> None:
    """Give every parameter and buffer of a model on "meta" its tensor; every tensor must be
    used.
    """
    description = tensors.description
    state: dict[str, Tensor] = {}
    buffers = {name for name, _ in model.named_buffers()}
    for name, parameter in model.state_dict().items():
        places = description.places.get(name)
        if places is None:
            raise _missing(name, model, description, tensors.source)
        if None in places:
            floating, part = parameter.is_floating_point(), part_of(parameter)
            found = tensors.get(places[None], tuple(parameter.shape), floating=floating, part=part)
            placed = tensors.placed(found, cast=name not in buffers)
        else:
            placed = _stacked(name, parameter, places, tensors)
        state[name] = divided_like(parameter, placed)
    unused = sorted(set(description.places) - set(state))
    surplus = [name for name in unused if not _belongs_elsewhere(name, task, description)]
    if surplus:
        disk = next(iter(description.places[surplus[0]].values()))
        reason = f"unexpected tensor {disk!r}"
        raise TensorMismatch(
            f"{reason} ({len(surplus)} in all): the config has no place for it",
            path=tensors.source.path,
            key=disk,
        )
    model.load_state_dict(state, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _stacked(
    name: str, parameter: Tensor, places: dict[int | None, str], tensors: _Tensors
) -> Tensor:
    """One stack (E, ...), or what this rank has of it, from its experts; each is read once and
    converted on the way.
    """
    count = parameter.shape[0]
    missing = next((e for e in range(count) if e not in places), None)
    beyond = next((disk for e, disk in places.items() if e is None or e >= count), None)
    if missing is not None or beyond is not None:
        reason = (
            f"expert {missing} is missing" if beyond is None else f"unexpected tensor {beyond!r}"
        )
        raise TensorMismatch(
            f"{name}: {reason}",
            path=tensors.source.path,
            key=beyond or name,
            expected=f"{count} experts",
            found=len(places),
        )
    part, shape = part_of(parameter), tuple(parameter.shape[1:])
    first, held = part.offsets[0], part.sizes[0]
    names = [places[expert] for expert in range(first, first + held)]
    whole = tensors.stack(names, shape, part.inner) if names else None
    if whole is not None:
        return whole
    stack: Tensor | None = None
    for place, disk in enumerate(names):
        expert = tensors.get(disk, shape, part=part.inner)
        if stack is None:
            stack = large_empty(part.sizes, tensors.dtype or expert.dtype, tensors.device)
        stack[place].copy_(expert)
    return torch.empty(part.sizes, device=tensors.device) if stack is None else stack


def _missing(
    name: str, model: nn.Module, description: Description, source: Source
) -> TensorMismatch:
    if not description.has_decoder and name.startswith("decoder."):
        hint = 'Pass task="encoder".'
        return TensorMismatch("the checkpoint holds an encoder only", path=source.path, hint=hint)
    config: SwitchConfig = model.config  # type: ignore[assignment]
    on_disk = disk_names(name, mlp=description.family.mlp, num_experts=max(config.num_experts, 1))
    hint = did_you_mean(on_disk[0], list(source.tensors)[:2000])
    return TensorMismatch(
        f"missing tensor {on_disk[0]!r}", path=source.path, key=on_disk[0], hint=hint
    )


def _belongs_elsewhere(name: str, task: str, description: Description) -> bool:
    """Whether a tensor is rightly unused: of a stack or head that the task has not."""
    if name == HEAD:
        return task != "conditional_generation"
    return task == "encoder" and name.startswith("decoder.")


def _task(task: str | None, description: Description) -> str:
    if task is None:
        return task_of(description)
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}", field="task", hint=did_you_mean(task, TASKS))
    return task


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN wins in both, so two numbers tell it all
    return bool(torch.isfinite(low) & torch.isfinite(high))
