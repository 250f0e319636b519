"""One transformer block: attention, cross-attention in decoders, and an MLP, dense or sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.assemble import make_moe
from moezoo.config import SwitchConfig
from moezoo.functional.dropout import Dropout
from moezoo.layer import MoE
from moezoo.models.attention import Attention, merged_bias
from moezoo.models.cache import DecoderCache
from moezoo.models.feed_forward import DenseMLP
from moezoo.models.norm import norm_of
from moezoo.records import Routing

_FLOAT16_MARGIN = 1000.0


class Block(nn.Module):
    """x + attention, x + cross-attention (decoder), x + MLP; each on the normed x (pre-norm)."""

    def __init__(self, config: SwitchConfig, *, decoder: bool, layer: int) -> None:
        super().__init__()
        own_bias = layer == 0 or config.position_bias_every_layer
        self.attention_norm = norm_of(config)
        self.attention = Attention(config, decoder=decoder, layer=layer, position_bias=own_bias)
        if decoder:
            self.cross_norm = norm_of(config)
            self.cross_attention = Attention(config, decoder=True, layer=layer)
        self.mlp_norm = norm_of(config)
        sparse = layer in (config.decoder_sparse if decoder else config.encoder_sparse)
        # By construction: a tool may have put the layer into a class of its own when it is called.
        self.sparse = sparse
        self.mlp: MoE | DenseMLP
        if sparse:
            self.mlp = make_moe(config, decoder=decoder)
        else:
            self.mlp = DenseMLP(
                config.d_model,
                config.d_ff,
                activation_name=config.feed_forward_proj,
                dropout=config.dropout_rate,
            )
        self.dropout = Dropout(config.dropout_rate)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        offset: int | None = None,
        masks: Tensor | None = None,
        routed: Tensor | None = None,
        token_ids: Tensor | None = None,
        memory: Tensor | None = None,
        memory_bias: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Routing | None]:
        """x (B, L, D) -> (B, L, D), the bias that the next block attends with, and, for a sparse
        block, its Routing.

        A block with a table of position biases makes its own bias, of that table and `masks`, for
        tokens from `offset` on: whoever brings a block's weights for its call alone (FSDP) brings
        those of the table too. Others attend with `bias`, and so do all where offset is None.
        `routed` (B, L) marks the tokens that experts see; see `Stack.forward` for the rest.
        """
        if offset is not None:
            bias = self._own_bias(x, offset, masks, bias)
        x = finite(x + self.dropout(self.attention(self.attention_norm(x), bias, cache)))
        if memory is not None:
            attended = self.cross_attention.cross(self.cross_norm(x), memory, memory_bias, cache)
            x = finite(x + self.dropout(attended))
        normed = self.mlp_norm(x)
        if self.sparse:
            y, routing = self.mlp(normed, mask=routed, token_ids=token_ids)
        else:
            y, routing = self.mlp(normed), None
        return finite(x + self.dropout(y)), bias, routing

    def _own_bias(
        self, x: Tensor, offset: int, masks: Tensor | None, given: Tensor | None
    ) -> Tensor | None:
        length = x.shape[1]
        position = self.attention.relative_bias(
            length, offset + length, offset=offset, device=x.device
        )
        return given if position is None else merged_bias(position.to(x.dtype), masks)


def finite(x: Tensor) -> Tensor:
    """Clamp float16 activations, which overflow in large T5s; every other dtype passes
    untouched.
    """
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max - _FLOAT16_MARGIN
    return x.clamp(-limit, limit)
