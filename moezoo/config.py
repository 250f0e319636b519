"""The one configuration of the T5/Switch architecture: frozen, plain values, JSON both ways.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moezoo.errors import ConfigError, did_you_mean
from moezoo.frozen import frozen, thawed
from moezoo.registry import Spec, meant

ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu-tanh",
    "silu",
    "quick-gelu",
    "squared-relu",
    "gated-gelu",
    "gated-gelu-erf",
    "gated-silu",
    "gated-relu",
)
LAYOUTS = ("odd", "mixed", "bottom", "middle", "top", "all", "none")
STACKS = ("encoder", "decoder")
# No published dimension comes near; beyond it a config is corrupt, not ambitious.
_MAX_SIZE = 1_000_000
_SMALLEST_PUBLISHED = 512  # d_model of t5-small; the smallest Switch has 768
_PUBLISHED_SCALE = 0.1  # Switch Transformers, section 2.4
ComponentSpec = str | dict[str, Any]


@dataclass(frozen=True)
class SwitchConfig:
    """A T5 or Switch Transformer (arXiv 1910.10683, 2101.03961). Fields mean what Hugging Face
    means by them; nothing in a config changes, options of components included, so it is hashable.

    A dense T5 is the case without sparse layers (`num_experts=0`). `encoder_sparse_layers` and
    `decoder_sparse_layers` are a layout name (odd, mixed, bottom, middle, top, all, none) or
    explicit indices; mixed, bottom, middle and top make half of the layers sparse.
    `own_embeddings` names the stacks ("encoder", "decoder") that look tokens up in a table of their
    own instead of the shared one, which a tied head is tied to. `router`,
    `capacity` and `experts` are component names or `{"name": ..., **options}`; `capacity=None` is
    "switch", or "dropless" for routers that bound the load themselves. `shared_expert` holds the
    options of a branch that every token takes (`{}` for the defaults). `router_losses` maps loss
    names to coefficients, or to `{"coefficient": ..., **options}`; None is the router's
    `default_losses`, for most routers load_balance 0.01 and z 0 (the paper's). `eos_token_id` may
    be several: each ends a sequence, the first closes a target; an empty tuple: none does.
    `expert_capacity` is what a Switch checkpoint says of itself; `capacity="transformers"` follows
    it. `other_fields` is what config.json says besides: kept from file to file, without effect.
    `wo_scale` is what conversions have multiplied the experts' `wo` by since the model was dense or
    trained; None: no conversion has made it. `initializer_scale` is the variance of a sparse
    model's initial matrices over a dense one's (see `sparse_variance`); None: by its size.
    """

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 12
    num_decoder_layers: int | None = None
    num_heads: int = 12
    num_experts: int = 0
    encoder_sparse_layers: str | tuple[int, ...] = "odd"
    decoder_sparse_layers: str | tuple[int, ...] = "odd"
    feed_forward_proj: str = "relu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    position_bias_every_layer: bool = False
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    initializer_scale: float | None = None
    tie_word_embeddings: bool = True
    own_embeddings: tuple[str, ...] = ()
    scale_decoder_outputs: bool | None = None
    router: ComponentSpec = "switch"
    router_bias: bool = False
    capacity: ComponentSpec | None = None
    experts: ComponentSpec = "stacked"
    shared_expert: dict[str, Any] | None = None
    router_losses: dict[str, Any] | None = None
    group: str | int = "batch"
    allow_noncausal: bool = False
    wo_scale: float | None = None
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1
    decoder_start_token_id: int = 0
    expert_capacity: int | None = None
    other_fields: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and ":" in value and field.type.startswith("ComponentSpec"):
                value = Spec.parse(value, kind=field.name).to_json()
            if isinstance(value, (dict, list, tuple)):
                object.__setattr__(self, field.name, frozen(value))
        self._check_types()
        self._check_values()

    @property
    def decoder_layers(self) -> int:
        """Number of decoder blocks (`num_decoder_layers`, or as many as the encoder has)."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a sequence; the first one closes a target."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def scales_logits(self) -> bool:
        """Whether decoder outputs are scaled by d_model^-0.5 before the head."""
        given = self.scale_decoder_outputs
        return self.tie_word_embeddings if given is None else given

    @property
    def encoder_sparse(self) -> tuple[int, ...]:
        """Indices of the encoder's sparse blocks, sorted."""
        return (
            sparse_layers(self.encoder_sparse_layers, self.num_layers) if self.num_experts else ()
        )

    @property
    def decoder_sparse(self) -> tuple[int, ...]:
        """Indices of the decoder's sparse blocks, sorted."""
        return (
            sparse_layers(self.decoder_sparse_layers, self.decoder_layers)
            if self.num_experts
            else ()
        )

    @property
    def sparse_variance(self) -> float:
        """The variance of a sparse model's initial matrices over a dense T5's: `initializer_scale`,
        else the paper's 0.1 (2101.03961, section 2.4) from d_model 512 on, which the smallest
        published model has. Below that it is 1.0: at 32 and at 64 a tenth only costs steps
        (benchmarks/evidence.md, docs/reproductions.md).
        """
        if self.initializer_scale is not None:
            return self.initializer_scale
        return _PUBLISHED_SCALE if self.d_model >= _SMALLEST_PUBLISHED else 1.0

    @property
    def is_gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    def replace(self, **changes: Any) -> SwitchConfig:
        """A copy with fields changed. Raises ConfigError naming the nearest field for an unknown
        one.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(
                    f"unknown config field {name!r}", field=name, hint=did_you_mean(name, known)
                )
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal config back."""
        return {f.name: thawed(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SwitchConfig:
        """The inverse of `to_dict`. Raises ConfigError for unknown, mistyped or contradictory
        fields. A sparse model of before there was an `initializer_scale` has the paper's.
        """
        config = cls().replace(**dict(values))
        return config if "initializer_scale" in values else config.without_scale()

    def without_scale(self) -> SwitchConfig:
        """What a file without `initializer_scale` means: the paper's, at any size."""
        small = self.num_experts > 0 and self.d_model < _SMALLEST_PUBLISHED
        return self.replace(initializer_scale=_PUBLISHED_SCALE) if small else self

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SwitchConfig:
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"a config must be JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError("a config must be a JSON object", found=type(values).__name__)
        return cls.from_dict(values)

    def _check_types(self) -> None:
        for name, kinds in _FIELD_KINDS.items():
            value = getattr(self, name)
            wrong_bool = isinstance(value, bool) and bool not in kinds
            if wrong_bool or not isinstance(value, kinds):
                names = ("null" if kind is type(None) else kind.__name__ for kind in kinds)
                wanted = " or ".join(names)
                raise ConfigError(
                    f"{name} has the wrong type",
                    field=name,
                    expected=wanted,
                    found=repr(value)[:80],
                    hint=meant(name, value),
                )

    def _check_values(self) -> None:
        at_least_one = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads")
        buckets = ("relative_attention_num_buckets", "relative_attention_max_distance")
        for name in (*at_least_one, *buckets):
            _check_range(name, getattr(self, name), 1, _MAX_SIZE * 10)
        _check_range("expert_capacity", self.expert_capacity, 1, 2**31 - 1)
        _check_range("num_layers", self.num_layers, 1, 10_000)
        _check_range("num_decoder_layers", self.num_decoder_layers, 0, 10_000)
        _check_range("num_experts", self.num_experts, 0, _MAX_SIZE)
        self._check_ids()
        if not 0.0 <= self.dropout_rate <= 1.0:
            found = self.dropout_rate
            raise ConfigError("dropout_rate lies in [0, 1]", field="dropout_rate", found=found)
        for name in ("layer_norm_epsilon", "initializer_factor", "initializer_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be finite and > 0", field=name, found=value)
        if self.wo_scale is not None and not 0 < self.wo_scale < 1e9:
            raise ConfigError("wo_scale is no factor", field="wo_scale", found=self.wo_scale)
        if self.feed_forward_proj not in ACTIVATIONS:
            hint = did_you_mean(self.feed_forward_proj, ACTIVATIONS)
            raise ConfigError(
                f"unknown feed_forward_proj {self.feed_forward_proj!r}",
                field="feed_forward_proj",
                hint=hint,
            )
        _check_stacks(self.own_embeddings)
        _check_group(self.group)
        for name, setting in (self.router_losses or {}).items():
            coefficient = setting.get("coefficient") if isinstance(setting, dict) else setting
            if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
                reason = f"router_losses[{name!r}] must be a number, or options with a coefficient"
                raise ConfigError(reason, field="router_losses", found=setting)
        sparse_layers(self.encoder_sparse_layers, self.num_layers, "encoder_sparse_layers")
        sparse_layers(self.decoder_sparse_layers, self.decoder_layers, "decoder_sparse_layers")

    def _check_ids(self) -> None:
        for name in ("pad_token_id", "decoder_start_token_id"):
            _check_range(name, getattr(self, name), 0, self.vocab_size - 1)
        for token in self.eos_token_ids:
            if isinstance(token, bool) or not isinstance(token, int):
                reason = "eos_token_id must be an id or a list of ids"
                raise ConfigError(reason, field="eos_token_id", found=repr(self.eos_token_id)[:80])
            _check_range("eos_token_id", token, 0, self.vocab_size - 1)


_FIELD_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "num_experts")
        + ("relative_attention_num_buckets", "relative_attention_max_distance")
        + ("pad_token_id", "decoder_start_token_id"),
        (int,),
    ),
    "eos_token_id": (int, tuple),
    **dict.fromkeys(("num_decoder_layers", "expert_capacity"), (int, type(None))),
    "other_fields": (dict,),
    **dict.fromkeys(("encoder_sparse_layers", "decoder_sparse_layers"), (str, tuple)),
    "feed_forward_proj": (str,),
    **dict.fromkeys(
        ("position_bias_every_layer", "tie_word_embeddings", "router_bias", "allow_noncausal"),
        (bool,),
    ),
    "scale_decoder_outputs": (bool, type(None)),
    "own_embeddings": (tuple,),
    **dict.fromkeys(("wo_scale", "initializer_scale"), (int, float, type(None))),
    **dict.fromkeys(("dropout_rate", "layer_norm_epsilon", "initializer_factor"), (int, float)),
    **dict.fromkeys(("router", "experts"), (str, dict)),
    "capacity": (str, dict, type(None)),
    "shared_expert": (dict, type(None)),
    "router_losses": (dict, type(None)),
    "group": (str, int),
}


def sparse_layers(
    layers: str | tuple[int, ...], num_layers: int, field_name: str = "layers"
) -> tuple[int, ...]:
    """The indices that a layout names (zoo.md, placement layouts), or the given ones, checked and
    sorted.

    odd: every other layer, layer 0 dense (the paper's); mixed: every other, counted from the top
    (last one sparse); bottom / middle / top: that half of the stack. Raises ConfigError for unknown
    names and indices out of range.
    """
    if not isinstance(layers, str):
        bad = [
            i
            for i in layers
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_layers
        ]
        if bad or len(set(layers)) != len(layers):
            raise ConfigError(
                f"{field_name} holds layers that do not exist or repeat",
                field=field_name,
                expected=f"distinct indices in [0, {num_layers})",
                found=list(layers)[:20],
            )
        return tuple(sorted(layers))
    half, every = num_layers // 2, range(num_layers)
    start = (num_layers - half) // 2
    layouts: dict[str, tuple[int, ...]] = {
        "odd": tuple(every[1::2]),
        "mixed": tuple(i for i in every if (num_layers - 1 - i) % 2 == 0),
        "bottom": tuple(every[:half]),
        "middle": tuple(every[start : start + half]),
        "top": tuple(every[num_layers - half :]),
        "all": tuple(every),
        "none": (),
    }
    if layers not in layouts:
        hint = did_you_mean(layers, layouts)
        raise ConfigError(f"unknown layout {layers!r} in {field_name}", field=field_name, hint=hint)
    return layouts[layers]


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(
            f"{name} is out of range", field=name, expected=f"{low} to {high}", found=value
        )


def _check_stacks(stacks: tuple[str, ...]) -> None:
    if list(stacks) != [stack for stack in STACKS if stack in stacks]:
        raise ConfigError(
            "own_embeddings names stacks, each once and the encoder first",
            field="own_embeddings",
            expected=f"some of {', '.join(STACKS)}",
            found=repr(stacks)[:80],
        )


def _check_group(group: str | int) -> None:
    if isinstance(group, str) and group not in ("batch", "sequence"):
        raise ConfigError(
            "unknown group", field="group", expected="'batch', 'sequence' or a size", found=group
        )
    if not isinstance(group, str) and group < 1:
        raise ConfigError("a group size is at least 1", field="group", found=group)
