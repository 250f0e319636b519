"""The wrapped models, one per task: what goes in and comes out as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from moezoo.adapters.hf.base import MoezooPreTrainedModel
from moezoo.adapters.hf.cache import GenerationCache
from moezoo.errors import ConfigError
from moezoo.functional.collective import ranks_of_loss, summed_over_ranks
from moezoo.models.inputs import IGNORED, shifted_right
from moezoo.models.output import SwitchOutput


@dataclass
class MoezooOutput(ModelOutput):  # type: ignore[misc]
    """loss: cross entropy plus the weighted router losses, where labels were given. logits (B, L,
    V). aux_loss: the weighted router losses alone. The rest as in `SwitchOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: GenerationCache | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    aux_loss: Tensor | None = None


class MoezooEncoderModel(MoezooPreTrainedModel):
    """The encoder alone."""

    task = "encoder"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MoezooOutput | tuple[Any, ...]:
        """As `SwitchEncoderModel.forward`."""
        found = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds)
        output = MoezooOutput(last_hidden_state=found.last_hidden_state, aux_loss=found.loss)
        return _returned(output, return_dict)


class MoezooModel(MoezooPreTrainedModel):
    """Encoder and decoder without a head."""

    task = "model"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MoezooOutput | tuple[Any, ...]:
        """As `SwitchModel.forward`."""
        found = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
        )
        output = MoezooOutput(
            last_hidden_state=found.last_hidden_state,
            encoder_last_hidden_state=found.encoder_last_hidden_state,
            aux_loss=found.loss,
        )
        return _returned(output, return_dict)


class MoezooForConditionalGeneration(MoezooPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Encoder, decoder and head: Seq2SeqTrainer, `generate`, PEFT."""

    task = "conditional_generation"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        encoder_outputs: BaseModelOutput | Sequence[Tensor] | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MoezooOutput | tuple[Any, ...]:
        """As `SwitchForConditionalGeneration.forward`.

        Args:
            labels: (B, L). The decoder's input, when it is these shifted, may come along or not.
            num_items_in_batch: labels of the whole step, of all its batches and ranks: the loss is
                this batch's share of the step's, by its labels, that of the router losses by the
                labels of all ranks, among which they are averaged.
            use_cache: return a cache; the config's choice while generating without labels.

        Raises ConfigError where attentions or hidden states of every layer are asked for.
        """
        _refuse(output_attentions, output_hidden_states)
        if labels is not None:
            decoder_input_ids = self._unless_shifted(decoder_input_ids, labels)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None and not self.training
        if use_cache and past_key_values is None:
            past_key_values = GenerationCache()
        found: SwitchOutput = self.model(
            input_ids if encoder_outputs is None else None,
            attention_mask,
            labels=labels,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            encoder_last_hidden_state=None if encoder_outputs is None else encoder_outputs[0],
            past_key_values=None if past_key_values is None else past_key_values.inner,
        )
        routers = self.model.router_losses.weighted(
            {name: loss for name, loss in found.losses.items() if name != "cross_entropy"}
        )
        loss = found.loss
        if loss is not None and labels is not None and num_items_in_batch is not None:
            loss = _share_of_step(loss, routers, labels, num_items_in_batch)
        output = MoezooOutput(
            loss=loss,
            logits=found.logits,
            past_key_values=past_key_values,
            encoder_last_hidden_state=found.encoder_last_hidden_state,
            aux_loss=routers,
        )
        return _returned(output, return_dict)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels shifted right (B, L), for collators."""
        return shifted_right(labels, self.model.config)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder as `generate` calls it."""
        return EncoderOf(self.model)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, or None where it is the embeddings."""
        head: nn.Module | None = self.model.lm_head
        return head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # moezoo's own cache comes from `forward`

    def _unless_shifted(self, decoder_input_ids: Tensor | None, labels: Tensor) -> Tensor | None:
        """None for the shifted labels, which a collator made: the model then knows padding."""
        if decoder_input_ids is None or decoder_input_ids.shape != labels.shape:
            return decoder_input_ids
        same = torch.equal(decoder_input_ids, self.prepare_decoder_input_ids_from_labels(labels))
        return None if same else decoder_input_ids


class EncoderOf(nn.Module):
    """The encoder of a model that owns it; holds no parameters of its own."""

    main_input_name = "input_ids"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._owner = (model,)  # in a tuple, so that it is no submodule

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Encode input_ids (B, L) or inputs_embeds (B, L, D)."""
        _refuse(output_attentions, output_hidden_states)
        hidden, _, _ = self._owner[0]._encode(input_ids, attention_mask, inputs_embeds)
        return BaseModelOutput(last_hidden_state=hidden)


def _share_of_step(
    loss: Tensor, routers: Tensor | None, labels: Tensor, num_items: Tensor | int
) -> Tensor:
    """The loss of a batch as its part of a step of `num_items` labels, which Trainer sums over
    batches and ranks. Ranks share the router losses of a batch equally, however many labels each
    has.
    """
    own = (labels != IGNORED).sum()
    share = loss * own / num_items
    ranks = ranks_of_loss()
    if ranks == 1 or routers is None:
        return share
    return share + routers * (summed_over_ranks(own) / ranks - own) / num_items


def _refuse(output_attentions: bool | None, output_hidden_states: bool | None) -> None:
    """Fused attention keeps neither. Raises ConfigError."""
    if output_attentions or output_hidden_states:
        field = "output_attentions" if output_attentions else "output_hidden_states"
        raise ConfigError(f"{field} is not there", field=field, hint="Use forward hooks.")


def _returned(output: MoezooOutput, return_dict: bool | None) -> MoezooOutput | tuple[Any, ...]:
    if return_dict is None or return_dict:
        return output
    values: tuple[Any, ...] = output.to_tuple()
    return values
