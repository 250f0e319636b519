"""How sparse decoders say which of their layers have experts: one rule each, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
Layers = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """read: the sparse layers that the fields mean. write: the fields that mean some layers of how
    many, or None where none do. words: what can be said.
    """

    read: Callable[[Values, int], Layers]
    write: Callable[[Layers, int], dict[str, Any] | None]
    words: str


def _every(layers: Layers, count: int) -> dict[str, Any] | None:
    return {} if layers == tuple(range(count)) else None


def _read_steps(values: Values, count: int) -> Layers:
    dense, step = values.get("mlp_only_layers") or (), values.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        return ()
    return tuple(i for i in range(count) if i not in dense and (i + 1) % step == 0)


def _write_steps(layers: Layers, count: int) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": sorted({*range(count)} - {*layers})}


def _read_interval(values: Values, count: int) -> Layers:
    first, last = values.get("moe_layer_start_index", 1), values.get("moe_layer_end_index", 27)
    last, step = count - 1 if last == -1 else last, values.get("moe_layer_interval", 1)
    return tuple(i for i in range(count) if (i + 1) % step == 0 and first <= i <= last)


def _write_interval(layers: Layers, count: int) -> dict[str, Any] | None:
    for step in range(1, count + 1):
        fields = {
            "moe_layer_start_index": layers[0],
            "moe_layer_end_index": layers[-1],
            "moe_layer_interval": step,
        }
        if _read_interval(fields, count) == layers:
            return fields
    return None


def _read_types(values: Values, count: int) -> Layers:
    first = values.get("first_k_dense_replace", 0)
    kinds = values.get("mlp_layer_types") or [
        "dense" if layer < first else "sparse" for layer in range(count)
    ]
    return tuple(i for i, kind in enumerate(kinds[:count]) if kind == "sparse")


def _write_types(layers: Layers, count: int) -> dict[str, Any]:
    return {"mlp_layer_types": ["sparse" if i in layers else "dense" for i in range(count)]}


ALL = Placement(lambda values, count: tuple(range(count)), _every, "all layers")
STEPS = Placement(_read_steps, _write_steps, "any layers")
INTERVAL = Placement(_read_interval, _write_interval, "every n-th layer from one to another")
TYPES = Placement(_read_types, _write_types, "any layers")


def trailing(field: str, silent: int) -> Placement:
    """All layers from the one on that a field numbers."""

    def read(values: Values, count: int) -> Layers:
        return tuple(range(values.get(field, silent), count))

    def write(layers: Layers, count: int) -> dict[str, Any] | None:
        first = layers[0] if layers else count
        return {field: first} if layers == tuple(range(first, count)) else None

    return Placement(read, write, "all layers from one on")
