"""Saving a model all or nothing, by one process or by all ranks that hold it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moezoo.adapters.families import layout_for
from moezoo.adapters.formats.base import dtype_name, tensor_bytes
from moezoo.adapters.generation import NAME, written_generation
from moezoo.adapters.names import SHARED, disk_names
from moezoo.adapters.plug import inside_of, plugs_of
from moezoo.adapters.plugged import save_plugged
from moezoo.adapters.tensor_files import Pieces, TensorFiles, TensorPlan
from moezoo.adapters.together import replacing_together
from moezoo.adapters.writer import replacing_directory
from moezoo.building import TASKS
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.functional.shards import (
    class_of,
    is_first_holder,
    is_sharded,
    local_of,
    part_of,
    refuse_sharded,
    unwrapped,
)
from moezoo.models import SwitchForConditionalGeneration
from moezoo.quantization import is_quantized
from moezoo.tokenizer import BaseTokenizer


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

    Of a model that is sharded over ranks each writes its part, into the bytes that the whole model
    would have: every rank must call it, and see the same file system. DDP is looked through.

    Args:
        layout: "auto" (Hugging Face's whenever it can express the model), "huggingface", "moezoo".
        overwrite: replace what is at `path`.
        max_shard_size: bytes or such as "5GB"; None: one file.
        tokenizer: whose files go beside the weights; a model knows none by itself.

    Raises ConfigError for a model that is not moezoo's or a layout that cannot hold it, SaveError
    or TargetExists when writing is refused or fails; what was at `path` is then unchanged.
    """
    model = unwrapped(model)
    inside, _ = inside_of(model)
    if plugs_of(inside):
        model = inside
        refuse_beside_plugged(layout=None if layout == "auto" else layout)
        refuse_sharded(model, "saving a plugged model")
        save_plugged(model, path, overwrite=overwrite, max_shard_size=max_shard_size)
        return
    config = getattr(model, "config", None)
    task = next((name for name, kind in TASKS.items() if class_of(model) is kind), None)
    if not isinstance(config, SwitchConfig) or task is None:
        found, hint = type(model).__name__, _way_out(model)
        raise ConfigError("only moezoo models can be saved", field="model", found=found, hint=hint)
    if is_quantized(model):
        hint = "Save the model before moezoo.quantize; quantise again after loading."
        raise ConfigError("a quantised model cannot be saved", field="model", hint=hint)
    dtypes = {dtype_name(parameter.dtype) or "" for parameter in model.parameters()}
    family = layout_for(config, layout, dtypes=dtypes)
    tensors = {plan.name: (plan, pieces) for plan, pieces in _disk_tensors(model, family.mlp)}
    for name in family.copies(config, task):
        plan, pieces = tensors[SHARED]
        tensors[name] = dataclasses.replace(plan, name=name), pieces
    plans, contents = (
        [plan for plan, _ in tensors.values()],
        {n: p for n, (_, p) in tensors.items()},
    )

    def begin(stage: Path) -> None:
        values = {**family.write(config, task), "dtype": _dtype_word(model)}
        _write_json(stage / "config.json", values)
        if isinstance(model, SwitchForConditionalGeneration):
            _write_json(stage / NAME, written_generation(config, model.generation))
        if tokenizer is not None:
            tokenizer.save(stage)
        TensorFiles(stage, plans, max_shard_size, {"format": "pt"}).begin()

    def write(stage: Path) -> int:
        files = TensorFiles(stage, plans, max_shard_size, {"format": "pt"})
        return files.write(contents, whole=not together)

    together, total = is_sharded(model), sum(plan.nbytes for plan in plans)
    if together:
        replacing_together(path, overwrite=overwrite, bytes_needed=total, begin=begin, write=write)
        return
    with replacing_directory(path, overwrite=overwrite, bytes_needed=total) as stage:
        begin(stage)
        write(stage)


def _way_out(model: nn.Module) -> str:
    """How to save what is none of moezoo's models."""
    inside = next((name for name, part in model.named_modules() if plugs_of(part)), None)
    if inside is None:
        return "Save other modules with safetensors.torch.save_model."
    return f"Save its {inside!r}, which is what was plugged, or plug the whole."


def refuse_beside_plugged(**given: Any) -> None:
    """Refuse what is for moezoo's own models alone. Raises ConfigError."""
    for name, value in given.items():
        if value:
            hint = "moezoo.load(DIR) alone gives the model, whose own methods run it."
            raise ConfigError(f"a plugged model has no {name}", field=name, found=value, hint=hint)


def _disk_tensors(model: nn.Module, mlp: str) -> Iterator[tuple[TensorPlan, Callable[[], Pieces]]]:
    """What a model is on disk, and what this rank has of each tensor, looked up when it is asked
    for.
    """
    for name, tensor in model.state_dict().items():
        word = dtype_name(tensor.dtype)
        if word is None or tensor.is_meta:
            found = "a meta tensor" if tensor.is_meta else tensor.dtype
            raise ConfigError(f"{name} cannot be saved", field=name, found=found)
        names = disk_names(name, mlp=mlp, num_experts=tensor.shape[0] if tensor.dim() else 0)
        if ".experts.expert_0." not in names[0]:
            yield TensorPlan(names[0], word, tuple(tensor.shape)), partial(_pieces, tensor, None)
            continue
        for expert, disk in enumerate(names):
            plan = TensorPlan(disk, word, tuple(tensor.shape[1:]))
            yield plan, partial(_pieces, tensor, expert)


def _pieces(tensor: Tensor, expert: int | None) -> Pieces:
    """What this rank writes of a tensor, or of one expert of a stack."""
    if not is_first_holder(tensor):
        return
    part, held, shape = part_of(tensor), local_of(tensor), tuple(tensor.shape)
    if expert is not None:
        place = expert - part.offsets[0]
        if not 0 <= place < part.sizes[0]:
            return
        part, held, shape = part.inner, held[place], shape[1:]
    content, size = tensor_bytes(held.cpu()), tensor.element_size()
    for start, own, count in part.runs(shape):
        yield start * size, content[own * size : (own + count) * size]


def _dtype_word(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
