"""Reading a decoder's config.json: what is wrong, or has no word in the sibling. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moezoo.adapters.families.decoder_config import PLUG, DecoderConfig
from moezoo.adapters.families.dense_decoders import DENSE
from moezoo.adapters.families.fields import refuse_quantized
from moezoo.errors import ConfigError
from moezoo.frozen import FrozenDict, frozen, thawed

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_LARGEST = 1 << 32
# Kinds of fields, by the kind of what a class assumes: bool first, which is an int.
_KINDS: dict[type, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "true or false"),
    int: ((int, float), "a number"),
    float: ((int, float), "a number"),
    str: (str, "a name"),
}
_ATTENTION = ("full_attention", "sliding_attention", "linear_attention", "conv", "attention",
              "mamba")  # fmt: skip
# Fields of sparse models that decide what a layer computes, beside its numbers.
_SHAPING = (
    "moe_num_shared_experts",
    "n_shared_experts",
    "num_shared_experts",
    "n_group",
    "routed_scaling_factor",
    "shared_intermediate_size",
    "norm_topk_prob",
    "expert_selection_fn",
)


def read_decoder(values: Mapping[str, Any]) -> DecoderConfig:
    """The config that a config.json means. Raises ConfigError naming the field."""
    refuse_quantized(values)
    made = values.get("moezoo_provenance")
    own = {name: value for name, value in values.items() if name != "moezoo_provenance"}
    config = DecoderConfig(frozen(own), dense_values=_known_dense(made))
    kind = config.sparse_kind
    if kind is None:
        _refuse_lost(config)
    named = set(_SIZES) if kind is None else {*_SIZES, kind.width, kind.choices}
    if kind is not None and kind.dense_width != "intermediate_size" != kind.width:
        named.remove("intermediate_size")  # of a class that has no layers without experts
    for name in sorted(named):
        _check_size(name, values.get(config.dense_kind.older.get(name, name), values.get(name)))
    _check_kinds(config)
    if kind is not None:
        _check_size(kind.experts[0], config.num_experts)
        if config.choices > config.num_experts:
            raise ConfigError(
                "more choices than experts",
                field=kind.choices,
                expected=f"<= {config.num_experts}",
                found=config.choices,
            )
        for name, value in kind.sets.items():
            _refuse_sparse(name, value, config.full.get(name, value))
    for name in ("num_key_value_heads", "head_dim", *config.dense_kind.numbers):
        _check_size(name, config.full[name])
    if config.full.get("q_lora_rank") is not None:  # without, queries come from the stream itself
        _check_size("q_lora_rank", config.full["q_lora_rank"])
    _ = config.feed_forward_proj
    return config


def _known_dense(made: object) -> FrozenDict | None:
    """config.json of the dense model, from a provenance. Raises ConfigError for no such thing."""
    found = made.get("source_config") if isinstance(made, Mapping) else None
    if found is None:
        return None
    kind = DENSE.get(str(found.get("model_type"))) if isinstance(found, Mapping) else None
    old = "" if kind is None else kind.older.get("intermediate_size", "")
    if kind is None or not isinstance(found.get(old, found.get("intermediate_size")), int):
        raise ConfigError(
            "moezoo_provenance.source_config is no config.json of a decoder",
            field="source_config", found=repr(found)[:80],
        )  # fmt: skip
    dense: FrozenDict = frozen(dict(found))
    return dense


def _refuse_lost(config: DecoderConfig) -> None:
    """Refuse a dense model by the field that its sibling has no word for."""
    dense = config.dense_kind
    rope = config.values.get("rope_scaling") or config.values.get("rope_parameters")
    nested = rope if isinstance(rope, Mapping) else {}
    for name, value in dense.only.items():
        found = config.values.get(name, nested.get(name, dense.defaults.get(name)))
        if found is not None and found != value:
            raise ConfigError(
                f"{dense.sibling} has no {name}{f' but {value!r}' if value else ''}", field=name,
                expected=repr(value),
                found=repr(found)[:80], hint=PLUG,
            )  # fmt: skip


def _refuse_sparse(name: str, value: Any, found: object) -> None:
    """Refuse a published sparse model whose layers are of a form that the row does not know."""
    same = found == value
    if isinstance(value, float) and isinstance(found, float):
        same = math.isclose(found, value, rel_tol=1e-5)  # see `added`
    if name in _SHAPING and not same:
        raise ConfigError(
            f"moezoo does not know sparse layers with this {name}", field=name,
            expected=repr(value), found=repr(found)[:80], hint="Load it with transformers.",
        )  # fmt: skip


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
        raise ConfigError(
            f"config.json has no {name!r}" if value is None else f"bad {name}",
            field=name, expected="a whole number > 0", found=repr(value)[:80],
            hint="Correct config.json, or download it again.",
        )  # fmt: skip


def _check_kinds(config: DecoderConfig) -> None:
    """Raise ConfigError for a field that is of another kind than what its class assumes."""
    kinds = config.dense_kind
    for name, assumed in kinds.defaults.items():
        kind = next((k for k in _KINDS if isinstance(assumed, k)), None)
        found = config.values.get(name)
        if kind is None or found is None or name.endswith("_token_id"):
            continue
        if not isinstance(found, _KINDS[kind][0]) or (kind is not bool and isinstance(found, bool)):
            raise _bad(name, _KINDS[kind][1], found)
    for name, known in (("layer_types", _ATTENTION), ("layers_block_type", _ATTENTION),
                        ("no_rope_layers", (0, 1))):  # fmt: skip
        found = config.values.get(name)
        if found is not None and not (
            isinstance(found, tuple)
            and len(found) >= config.num_layers
            and all(kind in known for kind in found)
        ):
            expected = f"a list of {config.num_layers} of {', '.join(map(str, known))}"
            raise _bad(name, expected, found)
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.values.get(name)
        if rope is not None and not isinstance(rope, Mapping):
            raise _bad(name, "an object", rope)
        ropes = name == "rope_parameters" and kinds.ropes and config.sparse_kind is None
        held = (value for value in (rope or {}).values() if value is not None)
        if any(isinstance(value, Mapping) != ropes for value in held):
            raise _bad(name, "a rotation by kind of attention" if ropes else "one rotation", rope)
        theta = {**config.values, **(rope or {})}.get("rope_theta")
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
            raise _bad("rope_theta", "a number", theta)


def _bad(name: str, expected: str, found: object) -> ConfigError:
    return ConfigError(
        f"bad {name}", field=name, expected=expected, found=repr(thawed(found))[:80],
        hint="Correct config.json, or download it again.",
    )  # fmt: skip
