"""Dense T5 and its relatives: v1.0, v1.1, FLAN, UL2, mT5, ByT5, UMT5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moezoo.adapters.families.base import Family, Weights, registry
from moezoo.adapters.families.fields import (
    activation_refusal,
    feed_forward,
    flag,
    shared_fields,
    written_fields,
)
from moezoo.adapters.foreign import named_model_type
from moezoo.adapters.names import DENSE_T5
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError


@registry.register("t5")
class T5Family(Family):
    """T5 (arXiv 1910.10683); mT5 and ByT5 differ in vocabulary, depth and defaults only.

    Whether the head is tied is read from the weights, since transformers 5 writes
    `tie_word_embeddings: true` for all of them; whether it is scaled from `scale_decoder_outputs`
    if present, else from the tie flag of the file (mT5 never scales).
    """

    model_types = ("t5", "mt5", "byt5")
    mlp = DENSE_T5

    def read(self, values: Mapping[str, Any], weights: Weights) -> SwitchConfig:
        mt5 = named_model_type(values, self.model_types) == "mt5"
        tied = flag(values, "tie_word_embeddings", default=True) and not mt5
        default = "gated-gelu" if mt5 else "relu"
        return SwitchConfig(
            **shared_fields(values),
            feed_forward_proj=feed_forward(values, weights, default=default),
            tie_word_embeddings=not weights.own_head,
            own_embeddings=weights.own_embeddings,
            scale_decoder_outputs=flag(values, "scale_decoder_outputs", default=tied),
        )

    def write(self, config: SwitchConfig, task: str) -> dict[str, Any]:
        return {
            **written_fields(config, task, "T5"),
            "model_type": "t5",
            "scale_decoder_outputs": config.scales_logits,
        }

    def refusal(self, config: SwitchConfig) -> str | None:
        if config.encoder_sparse or config.decoder_sparse:
            return "T5's layout has no experts"
        if config.position_bias_every_layer:
            return "T5's layout has one position bias per stack"
        return activation_refusal(config)


@registry.register("umt5")
class UMT5Family(Family):
    """UMT5 (arXiv 2304.09151) and Pile-T5: a position bias in every layer.

    Outputs are scaled as the file says: `scale_decoder_outputs` if present, else the tie flag. The
    published ones say false, and t5x does not scale them (`logits_via_embedding = False`);
    transformers 5 takes the flag for true whatever the file says, and scales.
    """

    model_types = ("umt5",)
    mlp = DENSE_T5

    def read(self, values: Mapping[str, Any], weights: Weights) -> SwitchConfig:
        tied = flag(values, "tie_word_embeddings", default=True)
        return SwitchConfig(
            **shared_fields(values),
            feed_forward_proj=feed_forward(values, weights, default="gated-gelu"),
            tie_word_embeddings=not weights.own_head,
            own_embeddings=weights.own_embeddings,
            scale_decoder_outputs=flag(values, "scale_decoder_outputs", default=tied),
            position_bias_every_layer=True,
        )

    def write(self, config: SwitchConfig, task: str) -> dict[str, Any]:
        return {
            **written_fields(config, task, "UMT5"),
            "model_type": "umt5",
            "scale_decoder_outputs": config.scales_logits,
        }

    def refusal(self, config: SwitchConfig) -> str | None:
        if config.encoder_sparse or config.decoder_sparse:
            return "UMT5's layout has no experts"
        if not config.position_bias_every_layer:
            return "UMT5's layout has a position bias in every layer"
        if config.tie_word_embeddings and not config.scales_logits:
            return "transformers scales UMT5's outputs where the head is tied"
        return activation_refusal(config)


@registry.register("longt5")
class LongT5Family(Family):
    """LongT5 (arXiv 2112.07916): recognised, and refused by name; its attention is its own."""

    model_types = ("longt5",)
    mlp = DENSE_T5

    def read(self, values: Mapping[str, Any], weights: Weights) -> SwitchConfig:
        raise long_t5_refusal(str(values.get("encoder_attention_type", "local"))[:40])

    def write(self, config: SwitchConfig, task: str) -> dict[str, Any]:
        raise ConfigError("LongT5 cannot be written", field="model_type")

    def refusal(self, config: SwitchConfig) -> str | None:
        return "LongT5's attention is its own"


def long_t5_refusal(kind: str, path: object = None) -> ConfigError:
    """Why LongT5 cannot be read, and what can be done with it."""
    return ConfigError(
        f"this is LongT5, whose {kind} attention moezoo's models cannot run",
        field="model_type",
        path=path,
        hint="Use transformers for the model and `moezoo.plug` for its MLPs.",
    )
