"""A recipe: everything that decides the bytes of an upcycled model, as plain values."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.adapters.formats.files import read_json, read_start, regular_file
from moezoo.adapters.tensor_files import parse_size
from moezoo.adapters.upcycle.inits import expert_inits, router_inits
from moezoo.adapters.upcycle.placement import Layers
from moezoo.adapters.upcycle.preservation import PRESERVE
from moezoo.dtypes import dtype_word
from moezoo.errors import ConfigError, did_you_mean
from moezoo.registry import Registry, Spec

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_MAX_EXPERTS = 65_536
_MAX_RECIPE = 64 << 10


@dataclass(frozen=True)
class Recipe:
    """How a dense model becomes sparse. The same recipe and source give the same bytes.

    Args:
        num_experts: experts per sparse layer.
        layers: see `placement.placed`; None: "odd" of a T5 with two layers and more, else "all".
        init, router_init: names of `expert_inits` and `router_inits`, as `"name"`, `"name:value"`
            or `{"name": ..., **options}`; router and capacity, of the sparse layers, alike, where
            a value alone is the router's k or the capacity's factor.
        preserve: "exact" scales `wo` so that the model computes what the dense one did.
        router, router_init: None: what `target.settled` chooses for the source and the layout.
        seed: of every random number.
        dtype: "float32", "bfloat16", "float16", or None to keep the source's.
        max_shard_size: bytes, or such as "5GB".
    """

    num_experts: int
    layers: Layers | None = None
    init: str | dict[str, Any] = "copy"
    preserve: str = "exact"
    router: str | dict[str, Any] | None = None
    router_init: str | dict[str, Any] | None = None
    capacity: str | dict[str, Any] | None = "dropless"
    seed: int = 0
    dtype: str | None = None
    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        _whole("num_experts", self.num_experts, 1, _MAX_EXPERTS)
        _whole("seed", self.seed, 0, 2**63 - 1)
        if self.preserve not in PRESERVE:
            raise ConfigError(
                "unknown preserve", field="preserve", expected=" or ".join(PRESERVE),
                found=repr(self.preserve)[:80],
            )  # fmt: skip
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_word(self.dtype, tuple(DTYPES)))
        parse_size(self.max_shard_size)
        for name, registry in (("init", expert_inits), ("router_init", router_inits)):
            if (value := getattr(self, name)) is not None:
                spec = component_spec(value, registry)
                registry.check_options(spec)
                object.__setattr__(self, name, spec.to_json())
        for name in ("router", "capacity"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Spec.parse(value, kind=name).to_json())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, defaults left out; `from_dict` gives an equal recipe back."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                values[field.name] = dict(value) if isinstance(value, Mapping) else value
        return values

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Raises ConfigError for unknown or missing fields."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"a recipe has no field {str(name)[:80]!r}",
                    field=str(name)[:80],
                    hint=did_you_mean(name, known),
                )
        if "num_experts" not in values:
            raise ConfigError("num_experts is missing", field="num_experts", hint="Say how many.")
        return cls(**dict(values))

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """A recipe from a TOML or JSON file."""
        return cls.from_dict(read_values(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The fields in a TOML or JSON recipe file. Raises ConfigError or CheckpointError."""
    path = Path(path).expanduser()
    if path.suffix != ".toml":
        return read_json(path)
    import tomllib  # with datetime, which nothing else needs

    if regular_file(path) > _MAX_RECIPE:
        raise ConfigError(f"{path}: too large for a recipe", field="recipe")
    try:
        return tomllib.loads(read_start(path, _MAX_RECIPE).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}", field="recipe") from None


def component_spec(value: object, registry: Registry[Any]) -> Spec:
    """A spec from `"name"`, `"name:value"` (its first option), `"name:option=value,..."`, or a
    mapping.
    """
    options: list[str] = []
    if isinstance(value, str) and ":" in value:
        component = registry.get(value.partition(":")[0])
        options = list(inspect.signature(component).parameters)
    return Spec.parse(value, kind=registry.kind, unnamed=options)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{name} must be a whole number",
            field=name,
            expected=f"{low} to {high}",
            found=repr(value)[:80],
        )
