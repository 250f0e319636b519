"""Every class of experts that transformers ships with `@use_experts_implementation`, tiny."""

from __future__ import annotations

import importlib
import inspect
import itertools
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


def tiny_block(name: str) -> nn.Module | None:
    """The module around the experts of a class, router and all; None where it takes more than a
    config and the number of its layer.
    """
    home, _, kind = name.rpartition(".")
    module = importlib.import_module(f"transformers.models.{home}")
    source = inspect.getsource(module)
    classes = re.finditer(r"^class (\w+)\(.*?(?=^class |\Z)", source, re.S | re.M)
    around = [found[1] for found in classes if f"= {kind}(" in found[0]]
    fields = set(re.findall(r"config\.(\w+)", source))
    for block, config in itertools.product(around, _configs(module)):
        try:
            return _drawn(getattr(module, block), _shrunk(config(), fields))
        except Exception:  # noqa: BLE001, S112  (the config of something else)
            continue
    return None


def _shrunk(config: Any, fields: set[str]) -> Any:
    for field in (found for found in fields if hasattr(config, found)):
        size = next((s for part, s in _SIZES.items() if part in field), None)
        if re.search("per_tok|top_?k|moe_k|topk", field):
            size = 2
        if re.search("group", field):
            size = 1
        if (
            size is not None
            and "shared" not in field
            and not isinstance(getattr(config, field), str)
        ):
            _set(config, field, size)
    return config


def _drawn(kind: Any, config: Any) -> nn.Module:
    takes_layer = "layer_idx" in inspect.signature(kind.__init__).parameters
    made: nn.Module = kind(config, layer_idx=0) if takes_layer else kind(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
            if parameter.dim() < 2:  # a factor of weights, as a rule
                parameter.abs_()
    for part in made.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"
    made(torch.randn(1, TOKENS, WIDTH))
    return made.eval()
