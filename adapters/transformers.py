"""Live models of Hugging Face transformers into moezoo models, and back."""

from __future__ import annotations

import json
from typing import Any, cast

import torch
from torch import Tensor, nn

from moezoo.adapters.families import family_of, layout_for
from moezoo.adapters.families.base import TASK_SUFFIX, Weights
from moezoo.adapters.formats.base import dtype_name
from moezoo.adapters.names import (
    HEAD,
    MAY_REPEAT,
    SHARED,
    TABLES,
    disk_names,
    is_head,
    is_stray,
    memory_name,
)
from moezoo.building import TASKS, build
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.functional.shards import refuse_sharded
from moezoo.generation_options import StoredGeneration
from moezoo.models import SwitchForConditionalGeneration


@torch.no_grad()
def from_transformers(model: nn.Module, *, drop_heads: bool = False) -> nn.Module:
    """A moezoo model that computes what a transformers T5 or Switch computes; weights are copied.

    Args:
        drop_heads: leave out a head that moezoo's models do not have, such as a classifier's.

    Raises ConfigError for a model that is not of the family.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        found = type(model).__name__
        raise ConfigError("not a transformers model", field="model", found=found)
    values = config.to_dict()
    family, task = family_of(values), _task(model, drop_heads=drop_heads)
    inner: nn.Module = getattr(model, "transformer", model)  # a classifier's model without it
    state = {
        name: tensor
        for name, tensor in inner.state_dict().items()
        if not is_stray(name) and not (drop_heads and is_head(name))
    }
    # What is one parameter in memory is no table of its own, whatever the config says.
    shared = state[SHARED].data_ptr()
    for name in MAY_REPEAT:
        if name in state and state[name].data_ptr() == shared:
            del state[name]
    own = tuple(stack for stack, table in TABLES.items() if table in state)
    ours = family.read(values, Weights(frozenset(state), HEAD in state, own))
    twin = build(ours, task=task, device="meta")
    twin.load_state_dict(_stacked(state), strict=True, assign=True)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    if isinstance(twin, SwitchForConditionalGeneration) and model.generation_config is not None:
        stored: Any = model.generation_config
        twin.generation = StoredGeneration.of(json.loads(stored.to_json_string()))
    return twin.train(model.training)


@torch.no_grad()
def to_transformers(model: nn.Module) -> nn.Module:
    """A transformers model that computes what a moezoo model computes; weights are copied.

    Raises ConfigError, with the reason, when no class of transformers can.
    """
    import transformers

    refuse_sharded(model, "to_transformers")
    ours = getattr(model, "config", None)
    task = next((name for name, kind in TASKS.items() if type(model) is kind), None)
    if not isinstance(ours, SwitchConfig) or task is None:
        found = type(model).__name__
        raise ConfigError("not a moezoo model", field="model", found=found)
    dtypes = {dtype_name(parameter.dtype) or "" for parameter in model.parameters()}
    family = layout_for(ours, "huggingface", dtypes=dtypes)
    values = family.write(ours, task)
    (architecture,) = values.pop("architectures")
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    twin: Any = getattr(transformers, architecture)(config)
    state = {
        disk: part.clone()
        for name, tensor in model.state_dict().items()
        for disk, part in _parts(name, tensor, family.mlp, ours.num_experts)
    }
    state |= {name: state[SHARED].clone() for name in family.copies(ours, task)}
    for name in MAY_REPEAT:
        if name in state:  # untied from the shared embeddings
            owner = twin.get_submodule(name.removesuffix(".weight"))
            owner.weight = nn.Parameter(state[name])
    missing, unexpected = twin.load_state_dict(state, strict=False)
    missing = [n for n in missing if n not in MAY_REPEAT]
    assert not missing, f"transformers wants {missing}"
    assert not unexpected, f"transformers does not know {unexpected}"
    if isinstance(model, SwitchForConditionalGeneration):
        twin.generation_config.update(allow_custom_entries=True, **model.generation.values)
    return cast(nn.Module, twin.train(model.training))


def _parts(name: str, tensor: Tensor, mlp: str, num_experts: int) -> list[tuple[str, Tensor]]:
    names = disk_names(name, mlp=mlp, num_experts=num_experts)
    stacked = ".mlp.experts." in name
    return list(zip(names, tensor.unbind(0) if stacked else [tensor], strict=True))


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        place = memory_name(name)
        if place.expert is None:
            made[place.name] = tensor.detach().clone()
        else:
            experts.setdefault(place.name, {})[place.expert] = tensor.detach()
    for name, parts in experts.items():
        made[name] = torch.stack([parts[e] for e in range(len(parts))])
    return made


def _task(model: nn.Module, *, drop_heads: bool) -> str:
    name = type(model).__name__
    if drop_heads and any(is_head(part) for part, _ in model.named_parameters()):
        inner: nn.Module = getattr(model, "transformer", model)
        if hasattr(inner, "lm_head"):
            return "conditional_generation"
        return "model" if hasattr(inner, "decoder") else "encoder"
    task = next((task for task, suffix in TASK_SUFFIX.items() if name.endswith(suffix)), None)
    if name.endswith("EncoderModel"):
        task = "encoder"
    if task is None:
        hint = f"Pass drop_heads=True, or a class that ends in {' or '.join(TASK_SUFFIX.values())}."
        raise ConfigError("unknown head", field="model", found=name, hint=hint)
    return task
