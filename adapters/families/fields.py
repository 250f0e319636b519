"""What the fields of a config.json of the T5 family mean, and what is written back.

A field that means something here is read exactly or refused by name; `other_fields` keeps the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moezoo.adapters.families.base import TASK_SUFFIX, Weights
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError

_SHARED = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
)
_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
# transformers' attribute_map: names by which a T5 config may be given too.
_ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Fields whose meaning a SwitchConfig holds, or that say how a file is laid out; `write` says them
# anew. Those that start so belong to Switch or to moezoo.
_TOLD = frozenset(
    (*_SHARED, *_ALIASES, "pad_token_id", "eos_token_id", "decoder_start_token_id")
    + ("model_type", "architectures", "is_encoder_decoder", "dtype", "torch_dtype")
    + ("feed_forward_proj", "dense_act_fn", "is_gated_act")
    + ("tie_word_embeddings", "scale_decoder_outputs")
    + ("num_experts", "num_selected_experts", "expert_capacity", "add_router_probs")
    + ("encoder_sparse_step", "decoder_sparse_step", "batch_prioritized_routing")
    + ("num_sparse_encoder_layers", "num_sparse_decoder_layers")
)
_TOLD_STARTS = ("router_", "moezoo_")

# transformers' name of an activation -> ours; the fast, accurate and new gelus are one function.
_ACTIVATIONS = {
    "relu": "relu",
    "relu2": "squared-relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick-gelu",
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), "gelu-tanh"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), "gelu-tanh"),
}
_GATED = {
    "relu": "gated-relu",
    "silu": "gated-silu",
    "gelu": "gated-gelu-erf",
    "gelu-tanh": "gated-gelu",  # T5 v1.1's
}
# Our name -> dense_act_fn, is_gated_act and the feed_forward_proj that says the same.
_WRITTEN = {
    "relu": ("relu", False, "relu"),
    "squared-relu": ("relu2", False, "relu2"),
    "silu": ("silu", False, "silu"),
    "quick-gelu": ("quick_gelu", False, "quick_gelu"),
    "gelu": ("gelu", False, "gelu"),
    "gelu-tanh": ("gelu_new", False, "gelu_new"),
    "gated-relu": ("relu", True, "gated-relu"),
    "gated-silu": ("silu", True, "gated-silu"),
    "gated-gelu": ("gelu_new", True, "gated-gelu"),
    # "gated-gelu" alone means the tanh gelu; this spelling of the exact one cannot be misread.
    "gated-gelu-erf": ("gelu_python", True, "gated-gelu_python"),
}


def shared_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every T5 config shares: sizes, special ids, and what is kept besides.

    Raises ConfigError for a missing size, for two names of a field that disagree, and for what no
    reader of T5 can follow: quantised weights, an unknown dtype.
    """
    refuse_quantized(values)
    named = {k: v for k, v in values.items() if v is not None}
    for alias, name in _ALIASES.items():
        if named.setdefault(name, named.get(alias)) is None:
            del named[name]
        elif alias in named and named[alias] != named[name]:
            reason = f"config.json contradicts itself: {name} is {str(named[name])[:40]}"
            found = f"{alias} {str(named[alias])[:40]}"
            raise ConfigError(reason, field=name, found=found)
    for name in _REQUIRED:
        if name not in named:
            raise ConfigError(f"config.json has no {name!r}", field=name)
    for name in ("dtype", "torch_dtype"):
        if named.get(name, "float32") not in _DTYPES:
            found, wanted = repr(named[name])[:80], " or ".join(_DTYPES)
            raise ConfigError(f"unknown {name}", field=name, expected=wanted, found=found)
    fields = {name: named[name] for name in _SHARED if name in named}
    return {**fields, **_special_ids(values), "other_fields": other_fields(values)}


def other_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that a SwitchConfig does not hold: kept from file to file."""
    return {
        name: value
        for name, value in values.items()
        if name not in _TOLD
        and not name.startswith(_TOLD_STARTS)
        and not (name == "use_cache" and value is True)  # as every written config says
    }


def _special_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Special ids; where a file has none, transformers' way of generating decides.

    No `eos_token_id` is T5's 1, null ends no sequence. Null for padding is filled up with eos.
    Without a start the decoder begins with `bos_token_id`, and else with padding, as T5 does.
    """
    eos = values.get("eos_token_id", 1)
    eos = () if eos is None else eos
    first = eos[0] if isinstance(eos, (list, tuple)) and eos else eos or 0
    pad = values.get("pad_token_id", 0)
    pad = first if pad is None else pad
    starts = (values.get("decoder_start_token_id"), values.get("bos_token_id"), pad)
    start = next(value for value in starts if value is not None)
    return {"eos_token_id": eos, "pad_token_id": pad, "decoder_start_token_id": start}


def written_fields(config: SwitchConfig, task: str, prefix: str) -> dict[str, Any]:
    """The inverse of `shared_fields`, with what transformers wants besides."""
    dense_act_fn, is_gated_act, feed_forward_proj = _WRITTEN[config.feed_forward_proj]
    return {
        "use_cache": True,
        **config.to_dict()["other_fields"],
        **{name: getattr(config, name) for name in _SHARED},
        "num_decoder_layers": config.decoder_layers,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": eos_value(config),
        "decoder_start_token_id": config.decoder_start_token_id,
        "feed_forward_proj": feed_forward_proj,
        "dense_act_fn": dense_act_fn,
        "is_gated_act": is_gated_act,
        "architectures": [prefix + TASK_SUFFIX[task]],
        "is_encoder_decoder": task != "encoder",
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def eos_value(config: SwitchConfig) -> int | list[int] | None:
    """What config.json says for `eos_token_id`: an id, a list, or null for none."""
    eos = config.eos_token_id
    return (list(eos) or None) if isinstance(eos, tuple) else eos


def feed_forward(values: Mapping[str, Any], weights: Weights, *, default: str) -> str:
    """The activation by moezoo's name, as transformers 4 and 5 run it: `feed_forward_proj` tells
    it, and a `dense_act_fn` or `is_gated_act` of the file wins.

    Args:
        default: the `feed_forward_proj` of a file that has none.

    Raises ConfigError for an activation that moezoo has not, and for gates that the weights deny.
    """
    named = {name: value for name, value in values.items() if value is not None}
    projection = named.get("feed_forward_proj", default)
    words = projection.split("-") if isinstance(projection, str) else []
    if not words or len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise _unknown_activation("feed_forward_proj", projection)
    word = "gelu_new" if projection == "gated-gelu" else words[-1]
    word = named.get("dense_act_fn", word)
    culprit = "dense_act_fn" if "dense_act_fn" in named else "feed_forward_proj"
    gated = flag(values, "is_gated_act", default=words[0] == "gated")
    _check_gates(weights, gated, "is_gated_act" if "is_gated_act" in named else culprit)
    name = _ACTIVATIONS.get(word) if isinstance(word, str) else None
    name = _GATED.get(name or "") if gated else name
    if name is None:
        raise _unknown_activation(culprit, named.get(culprit, projection))
    return name


def gated_name(word: object, field: str = "hidden_act") -> str:
    """Transformers' name of the activation of a gated MLP as moezoo's. Raises ConfigError."""
    name = _GATED.get(_ACTIVATIONS.get(word, "")) if isinstance(word, str) else None
    if name is None:
        raise _unknown_activation(field, word)
    return name


def activation_refusal(config: SwitchConfig) -> str | None:
    """Why transformers has no word for a model's activation, or None when it has."""
    if config.feed_forward_proj not in _WRITTEN:
        return f"transformers has no word for feed_forward_proj {config.feed_forward_proj!r}"
    return None


def flag(values: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """A field that is true or false; null is the default. Raises ConfigError for another kind."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        found = repr(value)[:80]
        raise ConfigError(f"{name} must be true or false", field=name, found=found)
    return value


def refuse_quantized(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a config that speaks of quantised weights."""
    quantization = values.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    raise ConfigError(
        f"the weights are quantised ({str(method or 'unnamed')[:40]}), and not read by moezoo",
        field="quantization_config",
        hint="Use the model's weights in float32, bfloat16 or float16.",
    )


def refuse_others(values: Mapping[str, Any], name: str, value: object, why: str) -> None:
    """Raise ConfigError for a field that stands in a file with another value than this one."""
    found = values.get(name)
    if found is not None and (type(found) is not type(value) or found != value):
        shown = repr(found)[:80]
        raise ConfigError(f"{name}: {why}", field=name, expected=repr(value), found=shown)


def _check_gates(weights: Weights, gated: bool, field: str) -> None:
    """Refuse a config that says gated where the weights are not, or the other way round."""
    plain = any(name.endswith(".wi.weight") for name in weights.names)
    gates = any(name.endswith(".wi_0.weight") for name in weights.names)
    if plain != gates and gates != gated:
        found = "gated (wi_0, wi_1)" if gates else "not gated (wi)"
        hint = "Correct dense_act_fn and is_gated_act in config.json."
        raise ConfigError(
            f"{field} says {'gated' if gated else 'not gated'}, the weights are {found}",
            field=field,
            hint=hint,
        )


def _unknown_activation(field: str, value: object) -> ConfigError:
    known = ", ".join(sorted(_ACTIVATIONS))
    found = repr(value)[:80]
    hint = f"moezoo runs {known}, and gated relu, gelu and silu."
    return ConfigError(f"no such activation for {field}", field=field, found=found, hint=hint)
