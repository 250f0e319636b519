"""Families of checkpoints: which config.json means which model, and which layout can hold it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moezoo.adapters.families.base import Family, ModelConfig, Weights, registry
from moezoo.adapters.families.decoder_config import PLUG, DecoderConfig
from moezoo.adapters.families.decoders import DecoderFamily, decoder_family, family_for
from moezoo.adapters.families.native import NativeFamily
from moezoo.adapters.families.switch import SwitchFamily, float16_refusal
from moezoo.adapters.families.t5 import LongT5Family, T5Family, UMT5Family, long_t5_refusal
from moezoo.adapters.foreign import named_model_type, refuse_plugged
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, did_you_mean

# In the order in which `layout="auto"` tries them: the most widely read first.
_LAYOUTS = ("switch_transformers", "t5", "umt5")


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError naming the architecture of another."""
    refuse_plugged(values)
    if (decoder := decoder_family(values)) is not None and decoder.sparse is None:
        raise ConfigError(
            "not a model of the T5 family", field="model_type",
            found=f"the decoder {decoder.title}",
            hint="moezoo.upcycle(DIR, OUT, num_experts=8) converts its directory on disk; "
            "transformers loads and runs it.",
        )  # fmt: skip
    families = {t: name for name in registry.names() for t in registry.get(name).model_types}
    return registry.build(families[named_model_type(values, families)])


def foreign_type(values: Mapping[str, Any]) -> str | None:
    """The `model_type` of a config.json that is none of moezoo's families, such as "mixtral"."""
    stated = values.get("model_type")
    families = {t for name in registry.names() for t in registry.get(name).model_types}
    return stated if isinstance(stated, str) and stated not in families else None


def expressible(config: ModelConfig, dtypes: Collection[str] = ()) -> tuple[Family | None, str]:
    """The Hugging Face layout that can hold a model with weights of `dtypes` ("F16", ...), and "",
    or None and the reason.
    """
    if isinstance(config, DecoderConfig):
        return family_for(config), ""
    assert isinstance(config, SwitchConfig)
    reasons = []
    sparse = bool(config.encoder_sparse or config.decoder_sparse)
    narrow = float16_refusal(config) if sparse and "F16" in dtypes else None
    for name in _LAYOUTS:
        family = registry.build(name)
        reason = family.refusal(config)
        if reason is None:
            return (family, "") if narrow is None else (None, narrow)
        reasons.append(reason)
    by_position = 2 if config.position_bias_every_layer else 1
    return None, reasons[0] if sparse else reasons[by_position]


def layout_for(
    config: ModelConfig, layout: str = "auto", *, dtypes: Collection[str] = ()
) -> Family:
    """The family that a model is written in.

    Args:
        layout: "auto" (Hugging Face whenever it can express the model), "huggingface" or "moezoo".
        dtypes: of the weights, as "F16": what is exact in one may overflow in another.

    Raises ConfigError for an unknown layout, or for one that cannot hold the model, with the
    reason.
    """
    if layout not in ("auto", "huggingface", "moezoo"):
        hint = did_you_mean(layout, ("auto", "huggingface", "moezoo"))
        raise ConfigError(f"unknown layout {layout!r}", field="layout", hint=hint)
    family, reason = expressible(config, dtypes)
    if layout == "moezoo" and isinstance(config, DecoderConfig):
        raise ConfigError(
            f"moezoo's own layout holds T5s, not a {config.model_type}", field="layout",
            hint=f"Use layout='auto'. {PLUG}",
        )  # fmt: skip
    if layout == "huggingface" and family is None:
        hint = (
            "Use layout='moezoo', or bfloat16."
            if expressible(config)[0]
            else "Use layout='moezoo'."
        )
        raise ConfigError(
            f"the Hugging Face layout cannot hold it: {reason}", field="layout", hint=hint
        )
    return NativeFamily() if layout == "moezoo" or family is None else family


__all__ = [
    "DecoderConfig",
    "DecoderFamily",
    "Family",
    "LongT5Family",
    "ModelConfig",
    "NativeFamily",
    "SwitchFamily",
    "T5Family",
    "UMT5Family",
    "Weights",
    "decoder_family",
    "expressible",
    "family_of",
    "foreign_type",
    "layout_for",
    "long_t5_refusal",
    "registry",
]
