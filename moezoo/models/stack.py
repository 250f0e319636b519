"""An encoder or a decoder: blocks that share masks and position biases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moezoo.config import SwitchConfig
from moezoo.functional.dropout import Dropout
from moezoo.models.attention import causal_mask, key_mask
from moezoo.models.block import Block
from moezoo.models.cache import DecoderCache
from moezoo.models.embedding import Embedding
from moezoo.models.norm import norm_of
from moezoo.records import Routing


class Stack(nn.Module):
    """`num_layers` (or `decoder_layers`) blocks and a final norm.

    `gradient_checkpointing`: in training, recompute each block in backward instead of keeping its
    activations (non-reentrant; the recomputation sees the same random numbers and so the same
    routing).
    """

    def __init__(self, config: SwitchConfig, *, decoder: bool) -> None:
        super().__init__()
        layers = config.decoder_layers if decoder else config.num_layers
        self.blocks = nn.ModuleList(
            Block(config, decoder=decoder, layer=layer) for layer in range(layers)
        )
        self.final_norm = norm_of(config)
        self.dropout = Dropout(config.dropout_rate)
        own = ("decoder" if decoder else "encoder") in config.own_embeddings
        self.embed_tokens = (
            Embedding(config.vocab_size, config.d_model, std=config.initializer_factor)
            if own
            else None
        )
        self.decoder = decoder
        self.gradient_checkpointing = False

    def table(self, shared: nn.Embedding) -> nn.Embedding:
        """Where the stack looks its tokens up: its own embeddings, or the model's shared ones."""
        return shared if self.embed_tokens is None else self.embed_tokens

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        routed: Tensor | None = None,
        token_ids: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run the blocks.

        Args:
            x: (B, L, D) embeddings.
            mask: (B, Lk) real tokens, cached ones included; None: all.
            routed: (B, L) tokens that experts see; None: those of `mask`.
            token_ids: (B, L), for routers that route by token.
            memory, memory_mask: the encoder's output (B, Lm, D) and its real tokens (B, Lm), or
                fewer rows that divide B.
            cache: extended in place by the L new tokens.

        Returns:
            (B, L, D), and the routing of each sparse block.
        """
        offset = 0 if cache is None else cache.length
        masks = self._masks(x, mask, x.shape[1], offset)
        if routed is None and mask is not None:
            routed = mask[:, offset:]
        arguments = {
            "offset": offset,
            "masks": masks,
            "routed": routed,
            "token_ids": token_ids,
            "memory": memory,
            "memory_bias": key_mask(memory_mask, x.dtype),
            "cache": cache,
        }
        recompute = self.gradient_checkpointing and self.training and cache is None
        x, routing = self._run_blocks(self.dropout(x), masks, arguments, recompute=recompute)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.dropout(self.final_norm(x)), routing

    def _run_blocks(
        self,
        x: Tensor,
        bias: Tensor | None,
        arguments: Mapping[str, Any],
        *,
        recompute: bool,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        routings: list[Routing] = []
        for block in cast("list[Block]", self.blocks):
            run = partial(block, **arguments)
            x, bias, routing = (
                checkpoint(run, x, bias, use_reentrant=False) if recompute else run(x, bias)
            )
            if routing is not None:
                routings.append(routing)
        return x, tuple(routings)

    def _masks(self, x: Tensor, mask: Tensor | None, length: int, offset: int) -> Tensor | None:
        padding = key_mask(mask, x.dtype)
        if not self.decoder or length == 1:
            return padding
        causal = causal_mask(length, offset + length, x.dtype, x.device)
        return causal if padding is None else torch.minimum(causal, padding)
