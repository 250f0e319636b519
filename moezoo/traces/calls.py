"""A recorded call as tensors and plain numbers, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from moezoo.records import Assignment, Routing, SoftAssignment


def mapped(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A record with every tensor in it changed, those of inner records too."""
    changes = {}
    for entry in fields(record):
        value = getattr(record, entry.name)
        if isinstance(value, Tensor):
            changes[entry.name] = change(value)
        elif isinstance(value, (Assignment, SoftAssignment)):
            changes[entry.name] = mapped(value, change)
    return replace(record, **changes)


def moved(call: Routing, device: str | torch.device) -> Routing:
    moved: Routing = mapped(call, lambda tensor: tensor.detach().to(device))
    return moved


def flattened(record: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain numbers of a record by field name; inner records as dotted names."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for entry in fields(record):
        value = getattr(record, entry.name)
        if isinstance(value, Tensor):
            tensors[entry.name] = value.contiguous().clone()
        elif isinstance(value, (Assignment, SoftAssignment)):
            inner, numbers = flattened(value)
            tensors |= {f"{entry.name}.{name}": tensor for name, tensor in inner.items()}
            plain[entry.name] = numbers
        elif isinstance(value, int):
            plain[entry.name] = value
    return tensors, plain


def restored(tensors: Mapping[str, Tensor], prefix: str, values: Mapping[str, Any]) -> Routing:
    """A call from its tensors and numbers, checked. Raises KeyError, TypeError or RoutingError."""
    real, probs = tensors.get(f"{prefix}real"), tensors.get(f"{prefix}probs")
    made: dict[str, Assignment | SoftAssignment] = {}
    for name in ("assignment", "proposed"):
        if name not in values:
            continue
        kind = Assignment if values[name] else SoftAssignment
        arguments: dict[str, Any] = dict(values[name])
        for entry in fields(kind):
            if f"{prefix}{name}.{entry.name}" in tensors:
                arguments[entry.name] = tensors[f"{prefix}{name}.{entry.name}"]
        made[name] = kind(**arguments).check(real)
    return Routing(
        made["assignment"],
        probs=probs,
        real=real,
        proposed=made.get("proposed"),
        sequence_length=values.get("sequence_length", 0),
    )


def num_tokens(call: Routing) -> int:
    a = call.assignment
    if isinstance(a, SoftAssignment):
        return a.dispatch.shape[0] * a.dispatch.shape[1]
    return a.num_tokens
