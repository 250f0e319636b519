"""Hidden states and attention weights of a stack while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from moezoo.adapters.hf.attention import ChosenAttention
from moezoo.models.stack import Stack
from moezoo.records import Routing


@dataclass
class Kept:
    """What a stack computed on its way: `inputs` of its blocks (B, L, D), `attentions` (B, H, L,
    L) and `cross_attentions` (B, H, L, Lm) of each.
    """

    inputs: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    cross_attentions: list[Tensor] = field(default_factory=list)

    def hidden_states(self, last: Tensor | None) -> tuple[Tensor, ...] | None:
        """The input of each block, and what the stack returned."""
        return (*self.inputs, last) if self.inputs and last is not None else None


@contextmanager
def recorded(stack: Stack, *, hidden_states: bool, attentions: bool) -> Iterator[Kept]:
    """Keep what is asked for, of calls in this thread. Where nothing is, nothing is touched, so
    that a compiled model has no break here.
    """
    if not (hidden_states or attentions):
        yield Kept()
        return
    kept, thread, handles = Kept(), threading.get_ident(), []

    def keep_input(block: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            kept.inputs.append(args[0])

    watched: list[ChosenAttention] = []
    for block in stack.blocks if hidden_states else ():
        handles.append(block.register_forward_pre_hook(keep_input))
    for block in stack.blocks if attentions else ():
        for name in ("attention", "cross_attention"):
            attention = cast(ChosenAttention | None, getattr(block, name, None))
            if attention is not None:
                attention.keep = getattr(kept, f"{name}s").append
                watched.append(attention)
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
        for attention in watched:
            del attention.keep


def router_logits(routing: tuple[Routing, ...]) -> tuple[Tensor | None, ...]:
    """The logits (T, E) of each sparse layer; None of a router that has none."""
    return tuple(layer.logits for layer in routing)
