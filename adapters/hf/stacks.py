"""The encoder and the decoder of a wrapped model, which users of T5 call by themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moezoo.adapters.hf.attention import ChosenAttention
from moezoo.adapters.hf.cache import borrowed, cache_of, new_cache
from moezoo.adapters.hf.outputs import CACHE, MoezooEncoderOutput, MoezooStackOutput, returned
from moezoo.adapters.hf.recording import Kept, recorded, router_logits
from moezoo.models.attention import Attention
from moezoo.models.block import Block
from moezoo.models.cache import DecoderCache
from moezoo.models.inputs import embedded, real_tokens
from moezoo.models.linear import Linear
from moezoo.models.stack import Stack
from moezoo.records import Routing


class CheckpointedBlock(Block, GradientCheckpointingLayer):  # type: ignore[misc]
    """A Block that transformers' activation checkpointing recomputes in backward."""


class CallableStack(Stack):
    """A Stack that takes token ids too: `x` (B, L, D) means what it means to a Stack; ids (B, L),
    as `x` or `input_ids`, or `inputs_embeds` mean what they mean to transformers' T5.
    """

    main_input_name = "input_ids"
    owner: tuple[Any, Any]  # the moezoo model and the config; in a tuple, so as to be no submodule

    @property
    def config(self) -> Any:
        return self.owner[1]

    def get_input_embeddings(self) -> nn.Module:
        """Where tokens are looked up."""
        return self.table(self.owner[0].shared)

    def forward(
        self,
        x: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        routed: Tensor | None = None,
        token_ids: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `Stack.forward`, or as T5Stack's: the arguments say which."""
        if x is not None and x.is_floating_point():
            arguments: dict[str, Any] = {"routed": routed, "token_ids": token_ids, "cache": cache}
            return super().forward(x, mask, memory=memory, memory_mask=memory_mask, **arguments)
        config, past_key_values = self.config, cache_of(past_key_values, cache)
        if self.decoder and past_key_values is None and asked(use_cache, config.use_cache):
            past_key_values = new_cache()
        wanted = {
            "hidden_states": asked(output_hidden_states, config.output_hidden_states),
            "attentions": asked(output_attentions, config.output_attentions),
        }
        with recorded(self, **wanted) as kept:
            last, routing = self._of_ids(
                x if input_ids is None else input_ids,
                as_integers(mask if attention_mask is None else attention_mask),
                inputs_embeds,
                encoder_hidden_states,
                as_integers(encoder_attention_mask),
                borrowed(past_key_values) if self.decoder else None,
            )
        logits = asked(output_router_logits, config.output_router_logits)
        output = self._output(last, kept, router_logits(routing) if logits else None)
        if self.decoder:
            output[CACHE] = past_key_values
        return returned(output, return_dict, config)

    def _of_ids(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        embeds: Tensor | None,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        cache: DecoderCache | None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """What `Stack.forward` makes of ids (B, L) or embeddings (B, L, D)."""
        table: Any = self.get_input_embeddings()
        x = embedded(table, ids, embeds, mask, "input_ids")
        real = real_tokens(mask, x, "attention_mask", cache)
        if memory is not None:
            memory_mask = real_tokens(memory_mask, memory, "encoder_attention_mask")
        return super().forward(
            x, real, token_ids=ids, memory=memory, memory_mask=memory_mask, cache=cache
        )

    def _output(self, last: Tensor, kept: Kept, logits: Any) -> Any:
        shared: dict[str, Any] = {
            "last_hidden_state": last,
            "hidden_states": kept.hidden_states(last),
            "attentions": tuple(kept.attentions) or None,
            "router_logits": logits,
        }
        if not self.decoder:
            return MoezooEncoderOutput(**shared)
        return MoezooStackOutput(**shared, cross_attentions=tuple(kept.cross_attentions) or None)

    def _run_blocks(self, *args: Any, **options: Any) -> Any:
        return super()._run_blocks(*args, **{**options, "recompute": False})  # blocks do it


def asked(argument: bool | None, default: bool) -> bool:
    """What an argument says, and where it says nothing the config."""
    return bool(default if argument is None else argument)


def as_integers(mask: Tensor | None) -> Tensor | None:
    """A mask of ones and zeros (B, L) as integers: prompt tuning makes it floating."""
    return mask if mask is None or not mask.is_floating_point() else (mask != 0).long()


def twin(model: nn.Module) -> nn.Module:
    """The same model of other module objects: parameters and buffers are shared."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


_CLASSES: dict[type, type] = {
    Attention: ChosenAttention,
    Block: CheckpointedBlock,
    Linear: nn.Linear,  # tools such as quantize_dynamic look for exactly this
    Stack: CallableStack,
}


def opened(model: Any, config: Any) -> Any:
    """Make a moezoo model's modules those of a wrapped model, in place: stacks that take ids,
    blocks and attention as transformers configures them, torch's own linear maps, and a head that
    is a module where it is tied, too (its weight, on "meta", is to be tied).
    """
    model.gradient_checkpointing = False  # the state of transformers' switch, not moezoo's switch
    for module in model.modules():
        module.__class__ = kind = _CLASSES.get(type(module), type(module))
        if kind is ChosenAttention:
            module.settings = config
        elif kind is CallableStack:
            module.owner = (model, config)
    if getattr(model, "lm_head", False) is None:
        weight = model.shared.weight
        with torch.device("meta"):
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        model.lm_head = head
    return model
