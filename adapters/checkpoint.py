"""Loading any supported checkpoint into a model, and saving a model all or nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.adapters.checkpoint_source import task_of
from moezoo.adapters.description import Description, describe
from moezoo.adapters.families import layout_for
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.base import Source, dtype_name, tensor_bytes
from moezoo.adapters.generation import NAME, read_generation, written_generation
from moezoo.adapters.names import HEAD, SHARED, disk_names
from moezoo.adapters.plug import plugs_of
from moezoo.adapters.plugged import load_plugged, read_plugged, save_plugged
from moezoo.adapters.tensor_files import TensorPlan, write_tensors
from moezoo.adapters.writer import replacing_directory
from moezoo.building import TASKS, build, usable_device
from moezoo.config import SwitchConfig
from moezoo.dtypes import as_dtype
from moezoo.errors import ConfigError, NonFiniteWeights, TensorMismatch, did_you_mean
from moezoo.models import SwitchForConditionalGeneration
from moezoo.ops.memory import large_empty
from moezoo.quantization import is_quantized
from moezoo.tokenizer import BaseTokenizer


def load(
    path: str | Path,
    *,
    task: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    allow_nonfinite: bool = False,
    drop_heads: bool = False,
    **overrides: Any,
) -> nn.Module:
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
        overrides: fields of SwitchConfig that change no shape, such as `capacity="transformers"`.

    Raises CheckpointError (CorruptFile, IndexFileError, TensorMismatch, NonFiniteWeights,
    UnsafeCheckpoint) or ConfigError, naming file, tensor or field.
    """
    device = None if device is None else usable_device(device)
    precision = as_dtype(dtype)
    if read_plugged(path) is not None:
        _refuse_beside_plugged(task=task, drop_heads=drop_heads, **overrides)
        return load_plugged(path, device=device, dtype=precision)
    with open_source(path) as source:
        description = describe(source, drop_heads=drop_heads)
        config = description.config.replace(**overrides)
        chosen = _task(task, description)
        model = build(config, task=chosen, device="meta")
        tensors = _Tensors(source, description, device, precision, allow_nonfinite)
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


def save(
    model: nn.Module,
    path: str | Path,
    *,
    layout: str = "auto",
    overwrite: bool = False,
    max_shard_size: int | str | None = "5GB",
    tokenizer: BaseTokenizer | None = None,
) -> None:
    """Save a model of moezoo, or one that `moezoo.plug` has put experts into, as safetensors with
    its config.json; `path` is replaced in one step or not at all.

    Args:
        layout: "auto" (Hugging Face's whenever it can express the model), "huggingface", "moezoo".
        overwrite: replace what is at `path`.
        max_shard_size: bytes or such as "5GB"; None: one file.
        tokenizer: whose files go beside the weights; a model knows none by itself.

    Raises ConfigError for a model that is not moezoo's or a layout that cannot hold it, SaveError
    or TargetExists when writing is refused or fails; what was at `path` is then unchanged.
    """
    if plugs_of(model):
        _refuse_beside_plugged(layout=None if layout == "auto" else layout)
        save_plugged(model, path, overwrite=overwrite, max_shard_size=max_shard_size)
        return
    config = getattr(model, "config", None)
    task = next((name for name, kind in TASKS.items() if type(model) is kind), None)
    if not isinstance(config, SwitchConfig) or task is None:
        hint = "Save other modules with safetensors.torch.save_model."
        found = type(model).__name__
        raise ConfigError("only moezoo models can be saved", field="model", found=found, hint=hint)
    if is_quantized(model):
        hint = "Save the model before moezoo.quantize; quantise again after loading."
        raise ConfigError("a quantised model cannot be saved", field="model", hint=hint)
    dtypes = {dtype_name(parameter.dtype) or "" for parameter in model.parameters()}
    family = layout_for(config, layout, dtypes=dtypes)
    tensors = {
        plan.name: (plan, tensor_bytes(tensor))
        for plan, tensor in _disk_tensors(model, family.mlp, config.num_experts)
    }
    for name in family.copies(config, task):
        plan, content = tensors[SHARED]
        tensors[name] = dataclasses.replace(plan, name=name), content
    total = sum(plan.nbytes for plan, _ in tensors.values())
    with replacing_directory(path, overwrite=overwrite, bytes_needed=total) as stage:
        values = {**family.write(config, task), "dtype": _dtype_word(model)}
        _write_json(stage / "config.json", values)
        if isinstance(model, SwitchForConditionalGeneration):
            _write_json(stage / NAME, written_generation(config, model.generation))
        metadata = {"format": "pt"}
        write_tensors(stage, tensors, max_shard_size=max_shard_size, metadata=metadata)
        if tokenizer is not None:
            tokenizer.save(stage)


def _refuse_beside_plugged(**given: Any) -> None:
    """Refuse what is for moezoo's own models alone."""
    for name, value in given.items():
        if value:
            hint = f"Leave {name} out."
            raise ConfigError(f"a plugged model has no {name}", field=name, found=value, hint=hint)


@dataclass(frozen=True)
class _Tensors:
    """Tensors of a checkpoint, checked and converted on their way."""

    source: Source
    description: Description
    device: torch.device | str | None
    dtype: torch.dtype | None
    allow_nonfinite: bool

    def get(self, name: str, shape: tuple[int, ...], *, floating: bool = True) -> Tensor:
        """The tensor called `name` (without the prefix), as stored. Raises TensorMismatch."""
        full = self._full_name(name, shape)
        tensor = self.source.tensor(full).view(shape)
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

    def stack(self, names: Sequence[str], shape: tuple[int, ...]) -> Tensor | None:
        """Tensors of `shape` as one that needs no copy, or None: then each tells what is wrong."""
        whole = self.source.stack([self._full_name(name, shape) for name in names])
        if whole is None or not whole.is_floating_point():
            return None
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
            floating = parameter.is_floating_point()
            found = tensors.get(places[None], tuple(parameter.shape), floating=floating)
            state[name] = tensors.placed(found, cast=name not in buffers)
        else:
            state[name] = _stacked(name, parameter, places, tensors)
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
    """One stack (E, ...) from its experts; each is read once and converted on the way."""
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
    names = [places[expert] for expert in range(count)]
    whole = tensors.stack(names, tuple(parameter.shape[1:]))
    if whole is not None:
        return whole
    stack: Tensor | None = None
    for expert, disk in enumerate(names):
        part = tensors.get(disk, tuple(parameter.shape[1:]))
        if stack is None:
            stack = large_empty(parameter.shape, tensors.dtype or part.dtype, tensors.device)
        stack[expert].copy_(part)
    assert stack is not None
    return stack


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


def _disk_tensors(
    model: nn.Module, mlp: str, num_experts: int
) -> Iterator[tuple[TensorPlan, Tensor]]:
    for name, tensor in model.state_dict().items():
        names = disk_names(name, mlp=mlp, num_experts=num_experts)
        stacked = ".experts.expert_0." in names[0]
        parts = tensor.unbind(0) if stacked else [tensor]
        for disk, part in zip(names, parts, strict=True):
            word = dtype_name(part.dtype)
            if word is None or part.is_meta:
                found = "a meta tensor" if part.is_meta else part.dtype
                raise ConfigError(f"{name} cannot be saved", field=name, found=found)
            yield TensorPlan(disk, word, tuple(part.shape)), part.cpu()


def _dtype_word(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
