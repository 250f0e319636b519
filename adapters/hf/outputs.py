"""What the wrapped models return, field by field as transformers' T5 and Switch do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

# What this transformers calls keys and values, of arguments and outputs alike: 5.24 renamed them.
CACHE = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"


def _renamed(kind: type) -> type:
    """A dataclass whose field `cache` goes by the name that this transformers reads."""
    if CACHE != "cache":
        fields = kind.__annotations__.items()
        kind.__annotations__ = {CACHE if n == "cache" else n: hint for n, hint in fields}
        setattr(kind, CACHE, kind.__dict__["cache"])
        del kind.cache  # type: ignore[attr-defined]
    return dataclass(kind)


@dataclass
class MoezooEncoderOutput(ModelOutput):  # type: ignore[misc]
    """last_hidden_state (B, L, D); hidden_states, attentions, router_logits: where asked for, one
    per layer (hidden_states: one more); aux_loss: the weighted router losses.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor | None, ...] | None = None
    aux_loss: Tensor | None = None


@_renamed
class MoezooStackOutput(ModelOutput):  # type: ignore[misc]
    """What a decoder alone returns; see `MoezooModelOutput`."""

    last_hidden_state: Tensor | None = None
    cache: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor | None, ...] | None = None


@_renamed
class MoezooModelOutput(ModelOutput):  # type: ignore[misc]
    """last_hidden_state (B, L, D) of the decoder; cache: one of transformers. What is there
    for each layer: where asked for. aux_loss: the weighted router losses.
    """

    last_hidden_state: Tensor | None = None
    cache: Any = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_router_logits: tuple[Tensor | None, ...] | None = None
    encoder_router_logits: tuple[Tensor | None, ...] | None = None
    aux_loss: Tensor | None = None


@_renamed
class MoezooOutput(ModelOutput):  # type: ignore[misc]
    """loss: cross entropy plus the weighted router losses, where labels were given. logits (B, L,
    V). aux_loss: the weighted router losses alone. The rest as in `MoezooModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Any = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_router_logits: tuple[Tensor | None, ...] | None = None
    encoder_router_logits: tuple[Tensor | None, ...] | None = None
    aux_loss: Tensor | None = None


def returned(output: Any, return_dict: bool | None, config: Any) -> Any:
    """An output, or a tuple of what is there: by the argument, and else by the config."""
    if return_dict is None:
        return_dict = config.return_dict
    return output if return_dict else output.to_tuple()
