"""The models: encoder-decoder, conditional generation, encoder only. Dense T5 is
`num_experts=0`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, ShapeError
from moezoo.generation_options import StoredGeneration
from moezoo.models.cache import DecoderCache
from moezoo.models.embedding import Embedding
from moezoo.models.generate import generate
from moezoo.models.initialize import initialize
from moezoo.models.inputs import (
    IGNORED,
    check_batch,
    check_hidden,
    check_labels,
    embedded,
    real_tokens,
    shifted_right,
    up_to_last_label,
)
from moezoo.models.linear import Linear, table_weight
from moezoo.models.losses import ModelLosses
from moezoo.models.output import SwitchOutput
from moezoo.models.stack import Stack
from moezoo.ops.linear import linear


class SwitchEncoderModel(nn.Module):
    """The encoder alone (text encoders, sentence models)."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, std=config.initializer_factor)
        self.encoder = Stack(config, decoder=False)
        self.router_losses = ModelLosses(config, [self.encoder])
        initialize(self, config)

    def reset_parameters(self) -> None:
        """Draw every weight, and set every buffer, as the constructor does."""
        initialize(self, self.config)

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.encoder.gradient_checkpointing = enabled

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> SwitchOutput:
        """Encode input_ids (B, L), or inputs_embeds (B, L, D); see `SwitchModel.forward`."""
        table = self.encoder.table(self.shared)
        x = embedded(table, input_ids, inputs_embeds, attention_mask, "input_ids")
        real = real_tokens(attention_mask, x, "attention_mask")
        hidden, routing = self.encoder(x, real, token_ids=input_ids)
        losses = self.router_losses(routing)
        return SwitchOutput(
            last_hidden_state=hidden,
            encoder_last_hidden_state=hidden,
            losses=losses,
            loss=self.router_losses.weighted(losses),
            routing=routing,
        )

    if TYPE_CHECKING:
        __call__ = forward


class SwitchModel(nn.Module):
    """Encoder and decoder without a head."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        if config.decoder_layers < 1:
            raise ConfigError(
                "an encoder-decoder needs a decoder layer", field="num_decoder_layers"
            )
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, std=config.initializer_factor)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.router_losses = ModelLosses(config, [self.encoder, self.decoder])
        self._make_head(config)
        initialize(self, config)

    def reset_parameters(self) -> None:
        """Draw every weight, and set every buffer, as the constructor does."""
        initialize(self, self.config)

    def _make_head(self, config: SwitchConfig) -> None:
        """A model without a head has none."""

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.encoder.gradient_checkpointing = enabled
        self.decoder.gradient_checkpointing = enabled

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
        past_key_values: DecoderCache | None = None,
        use_cache: bool = False,
    ) -> SwitchOutput:
        """Encode a source and run the decoder over a target prefix.

        Args:
            input_ids: (B, Ls) source ids, or inputs_embeds (B, Ls, D); not needed with
                encoder_last_hidden_state (B, Ls, D).
            attention_mask: (B, Ls), 1 for real tokens. Padding never changes a real token's output.
            decoder_input_ids: (B, L), or decoder_inputs_embeds (B, L, D).
            decoder_attention_mask: (B, L), cached positions included when a cache is given.
            past_key_values: keys and values of earlier target tokens; extended in place.
            use_cache: start a cache where none is given; it is returned.

        Raises ConfigError, ShapeError or DtypeError naming the argument.
        """
        return self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_last_hidden_state=encoder_last_hidden_state,
            cache=DecoderCache() if use_cache and past_key_values is None else past_key_values,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        *,
        inputs_embeds: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        encoder_last_hidden_state: Tensor | None,
        cache: DecoderCache | None,
        routed: Tensor | None = None,
    ) -> SwitchOutput:
        memory, real, encoder_routing = self._encode(
            input_ids, attention_mask, inputs_embeds, encoder_last_hidden_state
        )
        x = embedded(
            self.decoder.table(self.shared),
            decoder_input_ids,
            decoder_inputs_embeds,
            decoder_attention_mask,
            "decoder_input_ids",
        )
        check_batch(x, memory.shape[0], "decoder_input_ids", "the source")
        hidden, decoder_routing = self.decoder(
            x,
            real_tokens(decoder_attention_mask, x, "decoder_attention_mask", cache),
            routed=routed,
            token_ids=decoder_input_ids,
            memory=memory,
            memory_mask=real,
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
            past_key_values=cache,
        )

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
        encoded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[object, ...]]:
        """The encoder's output (B, L, D), its real tokens (B, L), and the routing."""
        if encoded is not None:
            check_hidden(encoded, self.config.d_model, "encoder_last_hidden_state")
            return encoded, real_tokens(attention_mask, encoded, "attention_mask"), ()
        table = self.encoder.table(self.shared)
        x = embedded(table, input_ids, inputs_embeds, attention_mask, "input_ids")
        real = real_tokens(attention_mask, x, "attention_mask")
        hidden, routing = self.encoder(x, real, token_ids=input_ids)
        return hidden, real, routing


class SwitchForConditionalGeneration(SwitchModel):
    """Encoder, decoder and language-model head: translation, summarisation, span corruption."""

    lm_head: nn.Linear | None
    generation = StoredGeneration()  # what the checkpoint says about it

    def _make_head(self, config: SwitchConfig) -> None:
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.d_model, config.vocab_size)

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
        past_key_values: DecoderCache | None = None,
        use_cache: bool = False,
    ) -> SwitchOutput:
        """As `SwitchModel.forward`, and logits (B, L, V).

        Args:
            labels: (B, L) target ids, -100 where nothing is to be predicted. Without
                decoder_input_ids the decoder reads them shifted right, and what lies behind a row's
                last label is padding, which experts do not see. With labels there is a `.loss`:
                cross entropy (mean over labels; 0 when there are none) plus the weighted router
                losses.
        """
        routed = None
        if labels is not None:
            check_labels(labels, self.config.vocab_size)
            labels = labels.long()
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = shifted_right(labels, self.config)
                routed = None if decoder_attention_mask is not None else up_to_last_label(labels)
        output = self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_last_hidden_state=encoder_last_hidden_state,
            cache=DecoderCache() if use_cache and past_key_values is None else past_key_values,
            routed=routed,
        )
        assert output.last_hidden_state is not None
        logits = self.head(output.last_hidden_state)
        if labels is None:
            return replace(output, logits=logits, loss=None)
        loss = cross_entropy(logits, labels)
        total = loss if output.loss is None else loss + output.loss
        losses = {"cross_entropy": loss, **output.losses}
        return replace(output, logits=logits, loss=total, losses=losses)

    generate = generate

    if TYPE_CHECKING:
        __call__ = forward

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        if self.config.scales_logits:
            hidden = hidden * self.config.d_model**-0.5
        if self.lm_head is None:
            return linear(hidden, table_weight(self.shared, hidden.device))
        logits: Tensor = self.lm_head(hidden)
        return logits


def cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean over labels that are not -100, in float32 (or float64); 0 when there are none.

    Args:
        smoothing: the share of every target that goes to all tokens alike (Szegedy et al., arXiv
            1512.00567, section 7).
    """
    if logits.shape[:2] != labels.shape:
        wanted, found = tuple(logits.shape[:2]), tuple(labels.shape)
        reason = "labels do not fit the decoder's input"
        raise ShapeError(reason, field="labels", expected=wanted, found=found)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat, targets = wide.reshape(-1, wide.shape[-1]), labels.reshape(-1)
    total = F.cross_entropy(
        flat, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    return total / (targets != IGNORED).sum().clamp(min=1)
