"""Tiny models of the four families, and inputs for them, as the common tests ask for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo.adapters.hf import (
    MoezooConfig,
    MoezooEncoderModel,
    MoezooForConditionalGeneration,
    MoezooModel,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {},
    "mt5": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
    },
    "umt5": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
        "position_bias_every_layer": True,
    },
    "switch": {"num_experts": 4, "capacity": "dropless"},
}
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "dropout_rate": 0.1,
    "initializer_factor": 0.002,
}
WHOLE = (MoezooModel, MoezooForConditionalGeneration)
ENCODER = (MoezooEncoderModel,)


class Inputs:
    """Sizes, a config and inputs; what a `ModelTesterMixin` calls its model_tester."""

    is_training = True
    batch_size = 13
    hidden_size = SIZES["d_model"]
    num_hidden_layers = SIZES["num_layers"]
    num_attention_heads = SIZES["num_heads"]
    encoder_seq_length = 7
    decoder_seq_length = 7

    def __init__(self, family: str, *, encoder: bool) -> None:
        self.family, self.encoder = family, encoder
        self.seq_length = self.encoder_seq_length if encoder else self.decoder_seq_length
        self.key_length = self.encoder_seq_length

    def get_config(self) -> MoezooConfig:
        # T5's own tests give it a first token, too: generation without a prompt starts with it.
        return MoezooConfig(
            **SIZES,
            **FAMILIES[self.family],
            bos_token_id=0,
            is_encoder_decoder=not self.encoder,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MoezooConfig, dict[str, Tensor]]:
        ids = self._ids(self.encoder_seq_length)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not self.encoder:
            targets = self._ids(self.decoder_seq_length)
            inputs["decoder_input_ids"] = targets
            inputs["decoder_attention_mask"] = torch.ones_like(targets)
        return self.get_config(), inputs

    def _ids(self, length: int) -> Tensor:
        return torch.randint(2, SIZES["vocab_size"], (self.batch_size, length))
