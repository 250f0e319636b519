"""The models: encoder-decoder, conditional generation, encoder only. Dense T5 is
`num_experts=0`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError
from moezoo.models.cache import DecoderCache
from moezoo.models.generate import generate
from moezoo.models.initialize import initialize
from moezoo.models.inputs import check_labels, check_mask, embedded, shifted_right
from moezoo.models.losses import ModelLosses
from moezoo.models.output import SwitchOutput
from moezoo.models.stack import Stack


class SwitchEncoderModel(nn.Module):
    """The encoder alone (text encoders, sentence models)."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, decoder=False)
        self.router_losses = ModelLosses(config, [self.encoder])
        initialize(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> SwitchOutput:
        """Encode input_ids (B, L), or inputs_embeds (B, L, D); see `SwitchModel.forward`."""
        x = embedded(self.shared, input_ids, inputs_embeds, attention_mask, "input_ids")
        check_mask(attention_mask, x, "attention_mask")
        hidden, routing = self.encoder(x, attention_mask, token_ids=input_ids)
        losses = self.router_losses(routing)
        return SwitchOutput(
            last_hidden_state=hidden,
            encoder_last_hidden_state=hidden,
            losses=losses,
            loss=self.router_losses.weighted(losses),
            routing=routing,
        )


class SwitchModel(nn.Module):
    """Encoder and decoder without a head."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        if config.decoder_layers < 1:
            raise ConfigError(
                "an encoder-decoder needs a decoder layer", field="num_decoder_layers"
            )
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.router_losses = ModelLosses(config, [self.encoder, self.decoder])
        self._make_head(config)
        initialize(self, config)

    def _make_head(self, config: SwitchConfig) -> None:
        """A model without a head has none."""

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.encoder.gradient_checkpointing = enabled
        self.decoder.gradient_checkpointing = enabled

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The encoder's output (B, L, D) and the routing of its sparse layers."""
        x = embedded(self.shared, input_ids, inputs_embeds, attention_mask, "input_ids")
        check_mask(attention_mask, x, "attention_mask")
        hidden, routing = self.encoder(x, attention_mask, token_ids=input_ids)
        return hidden, routing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        encoder_last_hidden_state: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> SwitchOutput:
        """Encode a source and run the decoder over a target prefix.

        Args:
            input_ids: (B, Ls) source ids, or inputs_embeds (B, Ls, D); not needed with
                encoder_last_hidden_state (B, Ls, D).
            attention_mask: (B, Ls), 1 for real tokens. Padding never changes a real token's output.
            decoder_input_ids: (B, L), or decoder_inputs_embeds (B, L, D).
            decoder_attention_mask: (B, L), cached positions included when a cache is given.
            cache: keys and values of earlier target tokens; extended in place.

        Raises ConfigError, ShapeError or DtypeError naming the argument.
        """
        if encoder_last_hidden_state is None:
            memory, encoder_routing = self.encode(
                input_ids, attention_mask, inputs_embeds=inputs_embeds
            )
        else:
            memory, encoder_routing = encoder_last_hidden_state, ()
        name = "decoder_input_ids"
        x = embedded(
            self.shared, decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, name
        )
        check_mask(decoder_attention_mask, x, "decoder_attention_mask", cache)
        hidden, decoder_routing = self.decoder(
            x,
            decoder_attention_mask,
            token_ids=decoder_input_ids,
            memory=memory,
            memory_mask=attention_mask,
            cache=cache,
        )
        routing = (*encoder_routing, *decoder_routing)
        losses = self.router_losses(routing)
        return SwitchOutput(
            last_hidden_state=hidden,
            encoder_last_hidden_state=memory,
            losses=losses,
            loss=self.router_losses.weighted(losses),
            routing=routing,
            cache=cache,
        )


class SwitchForConditionalGeneration(SwitchModel):
    """Encoder, decoder and language-model head: translation, summarisation, span corruption."""

    lm_head: nn.Linear | None

    def _make_head(self, config: SwitchConfig) -> None:
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        encoder_last_hidden_state: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> SwitchOutput:
        """As `SwitchModel.forward`, and logits (B, L, V).

        Args:
            labels: (B, L) target ids, -100 where nothing is to be predicted. Without
                decoder_input_ids the decoder reads them shifted right. Adds `.loss`: cross entropy
                (mean over labels; 0 when there are none) plus the weighted router losses.
        """
        if labels is not None:
            check_labels(labels, self.config.vocab_size)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = shifted_right(labels, self.config)
        output = super().forward(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_last_hidden_state=encoder_last_hidden_state,
            cache=cache,
        )
        hidden = output.last_hidden_state
        assert hidden is not None
        logits = self.head(hidden)
        losses, loss = dict(output.losses), output.loss
        if labels is not None:
            losses = {"cross_entropy": cross_entropy(logits, labels), **losses}
            loss = losses["cross_entropy"] + (0.0 if loss is None else loss)
        return SwitchOutput(
            logits=logits,
            loss=loss,
            losses=losses,
            last_hidden_state=hidden,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
            routing=output.routing,
            cache=cache,
        )

    generate = generate

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        if self.config.scales_logits:
            hidden = hidden * self.config.d_model**-0.5
        weight = self.shared.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, weight)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labels that are not -100, in float32 (or float64); 0 when there are none."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat, targets = wide.reshape(-1, wide.shape[-1]), labels.reshape(-1)
    total = F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
