"""Plugged models on disk: their weights, and in config.json what was plugged where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moezoo.adapters.foreign import PLUGGED as FIELD
from moezoo.adapters.formats import open_source
from moezoo.adapters.formats.base import dtype_name, tensor_bytes
from moezoo.adapters.plug import plug, plugs_of
from moezoo.adapters.sparse import Sparse, sparse
from moezoo.adapters.tensor_files import TensorPlan, write_tensors
from moezoo.adapters.writer import replacing_directory
from moezoo.errors import CheckpointError, ConfigError, TensorMismatch
from moezoo.quantization import is_quantized


def save_plugged(
    model: nn.Module,
    path: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = "5GB",
) -> None:
    """Save a model that `moezoo.plug` has put experts into; `path` is replaced in one step or not
    at all.

    config.json is the model's own, if it has one as models of transformers do, and says under
    `moezoo_plugged` which modules became experts, with which arguments of `sparse` and `plug`.

    Raises ConfigError for a model that is not plugged, or by something that JSON cannot say (a
    `make` of your own, a router that is an instance, a function as mask); SaveError or TargetExists
    as `moezoo.save`.
    """
    if is_quantized(model):
        hint = "Save the model before moezoo.quantize; quantise again after loading."
        raise ConfigError("a quantised model cannot be saved", field="model", hint=hint)
    adapted = next(
        (n for n, part in model.named_modules() if hasattr(part, "get_base_layer")), None
    )
    if adapted is not None:
        hint = "Save the adapter by save_pretrained of PEFT, or the model after merge_and_unload()."
        reason = f"{adapted!r} holds an adapter, which config.json cannot say"
        raise ConfigError(reason, field="model", hint=hint)
    values = {**_config_of(model), FIELD: _described(model)}
    tensors = {}
    for name, tensor in _own_tensors(model).items():
        word = dtype_name(tensor.dtype)
        if word is None or tensor.is_meta:
            found = "a meta tensor" if tensor.is_meta else tensor.dtype
            raise ConfigError(f"{name} cannot be saved", field=name, found=found)
        content = tensor.detach().cpu().contiguous()
        tensors[name] = TensorPlan(name, word, tuple(content.shape)), tensor_bytes(content)
    total = sum(plan.nbytes for plan, _ in tensors.values())
    with replacing_directory(path, overwrite=overwrite, bytes_needed=total) as stage:
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (stage / "config.json").write_text(text, encoding="utf-8")
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(stage)
        write_tensors(stage, tensors, max_shard_size=max_shard_size, metadata={"format": "pt"})


def load_plugged(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load what `save_plugged` wrote, in evaluation mode; every tensor must have its place.

    Args:
        model: the dense model that experts were put into, with any weights; changed in place. None:
            made by transformers from config.json. Or a plugged one, for a directory that does not
            say what was plugged where, such as a checkpoint of transformers' Trainer.
        device, dtype: where to and in which precision; None: CPU, as stored.

    Raises ConfigError where no model can be made, or what was plugged is not in it; TensorMismatch
    for a missing or unexpected tensor, or one of another shape.
    """
    path = Path(path)
    values = read_plugged(path)
    if values is None and model is not None and plugs_of(model):
        _fill(model, path, dtype)
        return model.to(device=device).eval()
    if values is None:
        hint = "moezoo.load reads models of moezoo, from_pretrained those of transformers."
        raise CheckpointError("config.json names nothing plugged", path=path, hint=hint)
    made = _made(path, values) if model is None else model
    for entry in _checked(values[FIELD], path):
        modules = frozenset(entry["modules"])
        make = sparse(**entry["sparse"])
        where = partial(_is_named, modules)
        there = {name for name, _ in made.named_modules(remove_duplicate=False)}
        if missing := sorted(modules - there):
            reason = f"the model has no module {missing[0]!r} to put experts into"
            raise ConfigError(reason, field="model", found=type(made).__name__)
        plug(made, where, make, mask=entry["mask"], causal=entry["causal"])
    _fill(made, path, dtype)
    return made.to(device=device).eval()


def read_plugged(path: str | Path) -> dict[str, Any] | None:
    """What config.json of a directory says, if it is that of a plugged model."""
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and FIELD in values else None


def _is_named(modules: frozenset[str], name: str, module: nn.Module) -> bool:
    return name in modules


def _checked(entries: Any, path: Path) -> list[dict[str, Any]]:
    """What config.json says of plugs, if it is what `save_plugged` writes. Raises ConfigError."""
    options = set(Sparse.__dataclass_fields__)
    given: list[Any] = entries if isinstance(entries, list) else [None]
    for entry in given:
        fine = isinstance(entry, dict) and entry.keys() == {"modules", "sparse", "mask", "causal"}
        fine = fine and isinstance(entry["modules"], list) and isinstance(entry["sparse"], dict)
        fine = fine and all(isinstance(name, str) for name in entry["modules"])
        if not fine or entry["sparse"].keys() != options:
            wanted = f"a list of modules, sparse ({', '.join(sorted(options))}), mask and causal"
            found = repr(entry)[:80]
            reason = f"{path / 'config.json'} does not say what was plugged where"
            raise ConfigError(reason, field=FIELD, expected=wanted, found=found)
    return given


def _described(model: nn.Module) -> list[dict[str, Any]]:
    """What was plugged where, in words of JSON."""
    entries = []
    for done in plugs_of(model):
        if not isinstance(done.make, Sparse):
            hint = "Save it with safetensors.torch.save_model, or plug with moezoo.sparse."
            reason = "only `sparse` can be named in a config"
            raise ConfigError(reason, field="make", found=done.make, hint=hint)
        options = dict(vars(done.make))
        entry = {"modules": done.names, "sparse": options, "mask": done.mask, "causal": done.causal}
        for field, value in [*options.items(), ("mask", done.mask)]:
            if not _is_json(value):
                hint = "Give it by name and options."
                reason = f"a {type(value).__name__} cannot be named in a config"
                raise ConfigError(reason, field=field, hint=hint)
        entries.append(entry)
    if not entries:
        hint = "Plug experts into it with moezoo.plug, in this process."
        found = type(model).__name__
        raise ConfigError("nothing is plugged into it", field="model", found=found, hint=hint)
    return entries


def _is_json(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _config_of(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {**values, "architectures": [type(model).__name__]}


def _made(path: Path, values: Mapping[str, Any]) -> nn.Module:
    """The dense model of config.json, by transformers."""
    names = values.get("architectures")
    if not names:
        hint = "Pass the dense model: load_plugged(path, model)."
        reason = "config.json names no class to make"
        raise ConfigError(reason, field="architectures", path=path, hint=hint)
    import transformers

    kind: Any = getattr(transformers, names[0], None)
    if kind is None:
        hint = "Pass the dense model: load_plugged(path, model)."
        reason = f"transformers has no class {names[0]!r}"
        raise ConfigError(reason, field="architectures", hint=hint)
    made: nn.Module = kind(kind.config_class.from_pretrained(path))
    if (path / "generation_config.json").is_file():
        made.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return made


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict, those that are one in memory by the first of their names."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            hint = "Save the model before it is quantised."
            found = type(value).__name__
            raise ConfigError(f"{name} is no tensor", field=name, found=found, hint=hint)
    return {name: t for name, t in state.items() if seen.setdefault(id(t), name) == name}


def _fill(model: nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    """Give every parameter and buffer its tensor; parameters alone are cast. Raises
    TensorMismatch.
    """
    wanted = _own_tensors(model)
    with open_source(path) as source:
        for name in sorted(wanted.keys() ^ source.tensors.keys()):
            what = "missing" if name in wanted else "unexpected"
            raise TensorMismatch(f"{what} tensor {name!r}", path=path, key=name)
        for name, place in wanted.items():
            tensor = source.tensor(name)
            if tensor.shape != place.shape:
                expected, found = tuple(place.shape), tuple(tensor.shape)
                reason = f"{name} has the wrong shape"
                raise TensorMismatch(reason, path=path, key=name, expected=expected, found=found)
            cast = isinstance(place, nn.Parameter) and tensor.is_floating_point()
            place.data = tensor.to(dtype if cast else None, copy=True)
