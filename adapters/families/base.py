"""What a family of checkpoints is: its config.json, both ways, and what its layout can hold."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.registry import Registry

TASK_SUFFIX = {
    "conditional_generation": "ForConditionalGeneration",
    "model": "Model",
    "encoder": "EncoderModel",
}


@dataclass(frozen=True)
class Weights:
    """What the tensors of a checkpoint say where its config may be silent or wrong.

    names: every tensor, without a prefix. own_head: an lm_head that differs from the embeddings.
    own_embeddings: stacks whose table of embeddings differs from the shared one.
    """

    names: frozenset[str]
    own_head: bool
    own_embeddings: tuple[str, ...] = ()

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith("decoder.block.") for name in self.names)


class Family(abc.ABC):
    """One `model_type` of config.json (or several that mean the same)."""

    model_types: tuple[str, ...] = ()
    mlp: str  # what the layout calls a block's MLP

    @abc.abstractmethod
    def read(self, values: Mapping[str, Any], weights: Weights) -> SwitchConfig:
        """The config that a config.json means for these weights. Raises ConfigError naming the
        field.
        """

    @abc.abstractmethod
    def write(self, config: SwitchConfig, task: str) -> dict[str, Any]:
        """The config.json of a model; `refusal` must be None."""

    @abc.abstractmethod
    def refusal(self, config: SwitchConfig) -> str | None:
        """Why the layout cannot hold a model, or None when it can."""

    def copies(self, config: SwitchConfig, task: str) -> tuple[str, ...]:
        """Names under which the layout wants the shared embeddings once more: none of most."""
        return ()


registry: Registry[Family] = Registry(
    "checkpoint family",
    Family,  # type: ignore[type-abstract]
    "moezoo.adapters",
)

_SHARED_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "pad_token_id",
    "decoder_start_token_id",
)
_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def shared_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every T5 config shares. Raises ConfigError for a missing size."""
    for name in _REQUIRED:
        if name not in values:
            raise ConfigError(f"config.json has no {name!r}", field=name)
    fields = {name: values[name] for name in _SHARED_FIELDS if values.get(name) is not None}
    if values.get("num_decoder_layers") is not None:
        fields["num_decoder_layers"] = values["num_decoder_layers"]
    if "eos_token_id" in values:
        eos = values["eos_token_id"]
        fields["eos_token_id"] = () if eos is None else eos
    return fields


def eos_value(config: SwitchConfig) -> int | list[int] | None:
    """What config.json says for `eos_token_id`: an id, a list, or null for none."""
    eos = config.eos_token_id
    return (list(eos) or None) if isinstance(eos, tuple) else eos


def written_fields(config: SwitchConfig, task: str, prefix: str) -> dict[str, Any]:
    """The inverse of `shared_fields`, with what transformers wants besides."""
    fields = {name: getattr(config, name) for name in _SHARED_FIELDS}
    fields["num_decoder_layers"] = config.decoder_layers
    fields["eos_token_id"] = eos_value(config)
    fields["architectures"] = [prefix + TASK_SUFFIX[task]]
    fields["is_encoder_decoder"] = task != "encoder"
    fields["tie_word_embeddings"] = config.tie_word_embeddings
    fields["use_cache"] = True
    return fields


def feed_forward(values: Mapping[str, Any]) -> str:
    """The activation by moezoo's name. Raises ConfigError for one that no T5 has."""
    name = values.get("feed_forward_proj")
    if name is None:
        activation = values.get("dense_act_fn", "relu")
        name = f"gated-{activation}" if values.get("is_gated_act") else activation
    names = {
        "gelu_new": "gelu-tanh",
        "gelu_pytorch_tanh": "gelu-tanh",
        "gated-gelu_new": "gated-gelu",
    }
    names["relu2"] = "squared-relu"
    names |= {"gated-swish": "gated-silu", "swish": "silu", "gated-gelu_pytorch_tanh": "gated-gelu"}
    if not isinstance(name, str):
        raise ConfigError(
            "feed_forward_proj must be a string", field="feed_forward_proj", found=repr(name)[:80]
        )
    return names.get(name, name)
