"""The wrapped models, one per task: what goes in and comes out as transformers has it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from moezoo.adapters.formats.files import read_json
from moezoo.adapters.generation import NAME, read_generation
from moezoo.adapters.hf.base import MoezooPreTrainedModel
from moezoo.adapters.hf.cache import borrowed, cache_of, new_cache
from moezoo.adapters.hf.loss import share_of_step
from moezoo.adapters.hf.outputs import (
    CACHE,
    MoezooEncoderOutput,
    MoezooModelOutput,
    MoezooOutput,
    returned,
)
from moezoo.adapters.hf.recording import Kept, recorded, router_logits
from moezoo.adapters.hf.stacks import as_integers, asked
from moezoo.errors import ConfigError
from moezoo.models.inputs import shifted_right
from moezoo.models.output import SwitchOutput
from moezoo.models.switch import cross_entropy


class MoezooEncoderModel(MoezooPreTrainedModel):
    """The encoder alone."""

    task = "encoder"

    def __init__(self, config: Any, model: nn.Module | None = None) -> None:
        config.is_encoder_decoder = False
        super().__init__(config, model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoezooEncoderOutput | tuple[Any, ...]:
        """As `SwitchEncoderModel.forward`, and what `output_*` ask for."""
        config = self.config
        with recorded(
            self.encoder,
            hidden_states=asked(output_hidden_states, config.output_hidden_states),
            attentions=asked(output_attentions, config.output_attentions),
        ) as kept:
            found = self.model(input_ids, as_integers(attention_mask), inputs_embeds=inputs_embeds)
        wanted = asked(output_router_logits, config.output_router_logits)
        output = MoezooEncoderOutput(
            last_hidden_state=found.last_hidden_state,
            hidden_states=kept.hidden_states(found.last_hidden_state),
            attentions=tuple(kept.attentions) or None,
            router_logits=router_logits(found.routing) if wanted else None,
            aux_loss=found.loss if self.training or wanted else None,
        )
        return returned(output, return_dict, config)  # type: ignore[no-any-return]


class _EncoderDecoder(MoezooPreTrainedModel):
    """What the two encoder-decoders share."""

    @property
    def decoder(self) -> Any:
        """The decoder: a stack that takes ids, as T5's."""
        return self.model.decoder

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        encoder_outputs: Any,
        past_key_values: Any,
        decoder_attention_mask: Tensor | None,
        *,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        output_router_logits: bool | None,
        **given: Any,
    ) -> tuple[SwitchOutput, dict[str, Any]]:
        """What the moezoo model found, and the fields that both outputs have."""
        config, source = self.config, encoder_outputs
        if past_key_values is not None and self.training and self.recomputes:
            warnings.warn("blocks are recomputed: no cache is used or returned", stacklevel=3)
            past_key_values = None
        if source is not None and not isinstance(source, (BaseModelOutput, MoezooEncoderOutput)):
            names = ("last_hidden_state", "hidden_states", "attentions")
            source = BaseModelOutput(**dict(zip(names, source, strict=False)))
        wanted = {
            "hidden_states": asked(output_hidden_states, config.output_hidden_states),
            "attentions": asked(output_attentions, config.output_attentions),
        }
        none = contextlib.nullcontext(Kept())
        with (
            recorded(self.decoder, **wanted) as decoded,
            recorded(self.encoder, **wanted) if source is None else none as encoded,
        ):
            found: SwitchOutput = self.model(
                input_ids if source is None else None,
                as_integers(attention_mask),
                encoder_last_hidden_state=None if source is None else source[0],
                decoder_attention_mask=as_integers(decoder_attention_mask),
                past_key_values=borrowed(past_key_values),
                **given,
            )
        fields: dict[str, Any] = {
            CACHE: past_key_values,
            "decoder_hidden_states": decoded.hidden_states(found.last_hidden_state),
            "decoder_attentions": tuple(decoded.attentions) or None,
            "cross_attentions": tuple(decoded.cross_attentions) or None,
            "encoder_last_hidden_state": found.encoder_last_hidden_state,
            "encoder_hidden_states": encoded.hidden_states(found.encoder_last_hidden_state),
            "encoder_attentions": tuple(encoded.attentions) or None,
        }
        if source is not None:
            fields["encoder_hidden_states"] = source.hidden_states
            fields["encoder_attentions"] = source.attentions
        if asked(output_router_logits, config.output_router_logits):
            # The encoder's come first.
            logits = router_logits(found.routing)
            split = len(logits) - len(self.model.config.decoder_sparse)
            fields["encoder_router_logits"] = logits[:split]
            fields["decoder_router_logits"] = logits[split:]
        return found, fields


class MoezooModel(_EncoderDecoder):
    """Encoder and decoder without a head."""

    task = "model"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | Sequence[Tensor] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
    ) -> MoezooModelOutput | tuple[Any, ...]:
        """As `SwitchModel.forward`, and what `output_*` ask for."""
        past_key_values = cache_of(past_key_values, cache)
        recomputed = self.training and self.recomputes
        if past_key_values is None and asked(use_cache, self.config.use_cache and not recomputed):
            past_key_values = new_cache()
        found, fields = self._run(
            input_ids,
            attention_mask,
            encoder_outputs,
            past_key_values,
            decoder_attention_mask,
            decoder_input_ids=decoder_input_ids,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
        )
        output = MoezooModelOutput(
            last_hidden_state=found.last_hidden_state,
            aux_loss=found.loss if self.training else None,
            **fields,
        )
        return returned(output, return_dict, self.config)  # type: ignore[no-any-return]


class MoezooForConditionalGeneration(_EncoderDecoder, GenerationMixin):  # type: ignore[misc]
    """Encoder, decoder and head: Seq2SeqTrainer, `generate`, PEFT."""

    task = "conditional_generation"
    _tied_weights_keys = {"model.lm_head.weight": "model.shared.weight"}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | Sequence[Tensor] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
    ) -> MoezooOutput | tuple[Any, ...]:
        """As `SwitchForConditionalGeneration.forward`, and what `output_*` ask for.

        Args:
            labels: (B, L). The decoder's input, when it is these shifted, may come along or not.
            num_items_in_batch: labels of the whole step, of all its batches and ranks: the loss is
                this batch's share of the step's, by its labels, that of the router losses by the
                labels of all ranks, among which they are averaged.
            cache, past_key_values: a cache of transformers, which is extended, by either name.
            use_cache: return a cache; the config's choice while generating without labels.
        """
        self._follow_ids()
        if labels is not None:
            decoder_input_ids = self._unless_shifted(decoder_input_ids, labels)
        past_key_values = cache_of(past_key_values, cache)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None and not self.training
        if use_cache and past_key_values is None:
            past_key_values = new_cache()
        found, fields = self._run(
            input_ids,
            attention_mask,
            encoder_outputs,
            past_key_values,
            decoder_attention_mask,
            labels=labels,
            decoder_input_ids=decoder_input_ids,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
        )
        routers = self.model.router_losses.weighted(
            {name: part for name, part in found.losses.items() if name != "cross_entropy"}
        )
        loss = self._smoothed(found, labels)
        if loss is not None and labels is not None and num_items_in_batch is not None:
            loss = share_of_step(loss, routers, labels, num_items_in_batch)
        wanted = self.training or labels is not None or "decoder_router_logits" in fields
        output = MoezooOutput(
            loss=loss, logits=found.logits, aux_loss=routers if wanted else None, **fields
        )
        return returned(output, return_dict, self.config)  # type: ignore[no-any-return]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels shifted right (B, L), for collators."""
        self._follow_ids()
        return shifted_right(labels, self.model.config)

    @property
    def lm_head(self) -> Any:
        """The head; its weight is that of the embeddings where they are tied."""
        return self.model.lm_head

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.model.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.lm_head = new_embeddings

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers', where a cache that is given holds the first tokens of the decoder's
        prompt already: they are not read again.
        """
        made: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids, cache = made.get("decoder_input_ids"), made.get(CACHE)
        if kwargs.get("is_first_iteration") and cache is not None and ids is not None:
            there = int(cache.get_seq_length())
            made["decoder_input_ids"] = ids[:, there:] if there < ids.shape[1] else ids
        made.pop("tokenizer", None)  # for stop strings; `forward` refuses all else that it lacks
        return made

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """The mask (B, Lk) of real tokens as it is: the decoder knows that it is causal."""
        return attention_mask

    def follow_generation(self, directory: Path) -> None:
        """Take the settings that transformers leaves out: those of config.json, where a directory
        has no generation_config.json, and fields of its own.
        """
        if not (directory / "config.json").is_file():
            return
        stored = read_generation(directory, read_json(directory / "config.json", most=1 << 20))
        settings, everything = self.generation_config, not (directory / NAME).is_file()
        left = {n: v for n, v in stored.values.items() if everything or not hasattr(settings, n)}
        settings.update(allow_custom_entries=True, **left)

    def _follow_ids(self) -> None:
        """Take over the special ids of the config, which users of transformers set on it."""
        said = {"pad_token_id": self.config.pad_token_id}
        said["decoder_start_token_id"] = self.config.decoder_start_token_id
        for name, value in said.items():
            if value is None:
                raise ConfigError(f"config.{name} has to be set", field=name)
        if any(getattr(self.model.config, name) != value for name, value in said.items()):
            self.model.config = self.model.config.replace(**said)

    def _smoothed(self, found: SwitchOutput, labels: Tensor | None) -> Tensor | None:
        """The loss, in training with the config's share of every target spread over all tokens."""
        share = self.config.label_smoothing if self.training else 0.0
        if not share or found.loss is None or found.logits is None or labels is None:
            return found.loss
        smooth = cross_entropy(found.logits, labels.long(), smoothing=share)
        return found.loss - found.losses["cross_entropy"] + smooth

    def _unless_shifted(self, decoder_input_ids: Tensor | None, labels: Tensor) -> Tensor | None:
        """None for the shifted labels, which a collator made: the model then knows padding."""
        if decoder_input_ids is None or decoder_input_ids.shape != labels.shape:
            return decoder_input_ids
        same = torch.equal(decoder_input_ids, self.prepare_decoder_input_ids_from_labels(labels))
        return None if same else decoder_input_ids
