"""Every class of experts that transformers ships with `@use_experts_implementation`, tiny."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

EXPERTS, WIDTH, HIDDEN, TOKENS, CHOICES = 6, 16, 12, 9, 3
_SIZES = {
    "experts": EXPERTS,
    "intermediate": HIDDEN,
    "hidden_size": WIDTH,
}


def names() -> list[str]:
    """module.Class of each, found in the sources."""
    found = []
    for file in sorted((Path(transformers.__path__[0]) / "models").glob("*/modeling_*.py")):
        for name in re.findall(
            r"^@use_experts_implementation.*\nclass (\w+)", file.read_text(), re.M
        ):
            found.append(f"{file.parent.name}.{file.stem}.{name}")
    return found


def tiny(name: str) -> nn.Module:
    """One of them of its own config, made small, with weights that are all drawn."""
    home, _, kind = name.rpartition(".")
    module = importlib.import_module(f"transformers.models.{home}")
    cls = getattr(module, kind)
    fields = re.findall(r"config\.(\w+)", inspect.getsource(cls.__init__.__wrapped__))
    made = _first(cls, _configs(module), fields)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, choices and weights; one expert is never chosen."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype)
    scores = torch.rand(TOKENS, EXPERTS, generator=draw)
    scores[:, 2] = -1.0
    weights, chosen = scores.topk(CHOICES, dim=-1)
    return x, chosen, weights.to(dtype)


def called(module: Any, implementation: str, *given: Tensor) -> Tensor:
    """The module's own forward by an implementation."""
    module.config._experts_implementation = implementation
    y: Tensor = module(*given)
    return y


def _configs(module: Any) -> list[type[PretrainedConfig]]:
    sources = [
        module,
        importlib.import_module(module.__name__.replace("modeling", "configuration")),
    ]
    found: dict[type[PretrainedConfig], None] = {}
    for source in sources:
        for value in vars(source).values():
            if inspect.isclass(value) and issubclass(value, PretrainedConfig):
                found[value] = None
    return list(found)


def _first(cls: type, configs: list[type[PretrainedConfig]], fields: list[str]) -> nn.Module:
    for kind in configs:
        config = kind()
        if not all(hasattr(config, field) for field in fields):
            continue
        for field in fields:
            size = next((s for part, s in _SIZES.items() if part in field), None)
            if size is not None:
                _set(config, field, size)
        made: nn.Module = cls(config)
        sizes = {size for p in made.parameters() for size in p.shape}
        assert sizes <= {EXPERTS, WIDTH, HIDDEN, 2 * HIDDEN}, sizes
        return made
    raise AssertionError(f"no config of {cls.__name__} has {fields}")


def _set(config: Any, field: str, size: int) -> None:
    """Past its check: some hold a size per kind of token, of which the model hands one on."""
    vars(config)[config.attribute_map.get(field, field)] = size
