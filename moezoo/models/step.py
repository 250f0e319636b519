"""A decoder's next token on weights and buffers that are looked up once per `generate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.experts.base import Experts
from moezoo.functional.dropout import Dropout
from moezoo.layer import MoE
from moezoo.models.attention import Attention, key_mask
from moezoo.models.block import Block
from moezoo.models.cache import DecoderCache
from moezoo.models.embedding import Embedding
from moezoo.models.feed_forward import DenseMLP
from moezoo.models.norm import RMSNorm
from moezoo.models.position import PositionBias
from moezoo.models.stack import Stack
from moezoo.ops.eager import is_eager
from moezoo.ops.observed import is_observed

_FIRST_SIZE = 32
_PLAIN = (Stack, Block, Attention, DenseMLP, RMSNorm, PositionBias, Dropout, nn.ModuleList)


class Product(Protocol):
    """A linear map of few rows that is called many times."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...

    def add_to(self, total: Tensor, x: Tensor) -> None: ...


def steps_apart(decoder: nn.Module, memory: Tensor) -> bool:
    """Whether `DecoderStep` computes what calling `decoder` would: its modules are those of this
    package, in evaluation, without a hook on any that is passed by (a sparse layer with hooks is
    called), float32 in main memory, outside autocast and tracing.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not is_eager():
        return False
    if not memory.is_cpu or memory.dtype != torch.float32:
        return False
    if any(p.dtype != torch.float32 or not p.is_cpu for p in decoder.parameters()):
        return False
    return all(_is_plain(module) for module in _passed_by(decoder))


def _passed_by(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a step does not call: all but sparse layers and embeddings."""
    if not isinstance(module, MoE):
        yield module
        for child in module.children():
            if type(child) is not Embedding:  # it is called, before the step
                yield from _passed_by(child)


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    known = kind in _PLAIN or "prepared" in vars(kind)  # not inherited beside another `forward`
    return known and not module.training and not is_observed(module, whole=True)


def _keeps_its_pair(moe: MoE) -> bool:
    """Whether a single token is sure to go through the expert that its router says by `alone`, and
    nobody looks at the routing.
    """
    if any(module.training or is_observed(module, whole=True) for module in moe.modules()):
        return False
    if type(moe) is not MoE or is_observed(moe, "route") or not isinstance(moe.experts, Experts):
        return False
    # Not inherited: another `forward` may do otherwise.
    says = "alone" in vars(type(moe.router)) and moe.router.may_be_alone()
    keeps = vars(type(moe.capacity)).get("keeps_one", False)
    return bool(says and keeps) and moe.shared is None and not moe.experts.is_spread


class DecoderStep:
    """What `decoder` computes for one new token in each of `rows` rows, by a third of the
    operators and a seventh of the Python calls that its modules take.

    Args:
        decoder: one that `steps_apart` accepts.
        memory, memory_mask: as in `Stack.forward`; `rows` is a multiple of memory's.
    """

    def __init__(
        self, decoder: Stack, memory: Tensor, memory_mask: Tensor | None, *, rows: int
    ) -> None:
        blocks = cast("list[Block]", list(decoder.blocks))
        mask = key_mask(memory_mask, memory.dtype)
        self.layers = [_Layer.of(block, memory, mask, rows) for block in blocks]
        self.final_norm = _Norm.of(decoder.final_norm)
        self.length = 0
        # (2 * layers, positions, R * H, dk): what a step adds is one piece of memory per layer.
        self.heads, width = blocks[0].attention.num_heads, blocks[0].attention.d_kv
        self.rows = rows
        # Tensors of inference mode must not reach the hooks of a sparse layer, which may keep them.
        self.unseen = all(layer.alone or layer.wo is not None for layer in self.layers)
        self.cache = memory.new_zeros(2 * len(blocks), _FIRST_SIZE, rows * self.heads, width)
        self.biases = self._position_biases()

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Hidden states (R, D) for embeddings x (R, D) of the next tokens (R, 1); x is used up."""
        if self.length == self.cache.shape[1]:
            self._grow()
        end = self.length + 1
        new = self.cache[:, self.length].view(self.cache.shape[0], self.rows, -1).unbind(0)
        keys = self.cache[::2, :end].permute(0, 2, 3, 1).unbind(0)
        values = self.cache[1::2, :end].transpose(1, 2).unbind(0)
        biases = [bias[:, :, -end:] for bias in self.biases]
        with torch.inference_mode() if self.unseen else torch.no_grad():
            for index, layer in enumerate(self.layers):
                bias = biases[min(index, len(biases) - 1)]
                layer.attend(x, new[2 * index : 2 * index + 2], keys[index], values[index], bias)
                layer.attend_memory(x)
                layer.feed_forward(x, token_ids)
        self.length = end
        return self.final_norm(x)

    def reorder(self, rows: Tensor) -> None:
        """Continue from the given rows."""
        layers, _, _, width = self.cache.shape
        filled = self.cache[:, : self.length].view(layers, -1, self.rows, self.heads, width)
        filled.copy_(filled.index_select(2, rows))

    def resume(self, cache: DecoderCache) -> None:
        """Go on after the tokens of another cache of the same rows."""
        while self.cache.shape[1] < cache.length:
            self._grow()
        self.length = cache.length
        for layer, pair in cache.self_attention.items():
            for place, kept in enumerate(pair, 2 * layer):
                positions = kept[:, :, : self.length].permute(2, 0, 1, 3)
                self.cache[place, : self.length] = positions.flatten(1, 2)

    def _grow(self) -> None:
        self.cache = torch.cat([self.cache, torch.zeros_like(self.cache)], 1)
        self.biases = self._position_biases()

    def _position_biases(self) -> list[Tensor]:
        """(R * H, 1, size) of each table that there is: the bias of the last of `size` positions,
        whose last columns are the biases of those before.
        """
        size = self.cache.shape[1]
        device = self.cache.device
        found = [
            layer.block.attention.relative_bias(1, size, offset=size - 1, device=device)
            for layer in self.layers
        ]
        return [bias[0].repeat(self.rows, 1, 1) for bias in found if bias is not None]


@dataclass(frozen=True)
class _Norm:
    """RMS norm as x / hypot(|x|, sqrt(D eps)) * (sqrt(D) weight): half of its operators."""

    weight: Tensor
    floor: Tensor
    zero: Tensor
    least: float

    @staticmethod
    def of(norm: RMSNorm) -> _Norm:
        width = norm.weight.shape[0]
        least = (width * norm.eps) ** 0.5
        floor = norm.weight.new_tensor([[least]])
        return _Norm(norm.weight * width**0.5, floor, norm.weight.new_zeros(1, width), least)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 and self.least:  # a number for the host
            scale = 1.0 / math.hypot(float(torch.linalg.vector_norm(x)), self.least)
            return torch.addcmul(self.zero, x, self.weight, value=scale)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.div(x, torch.hypot(size, self.floor)).mul_(self.weight)


@dataclass(frozen=True)
class _Memory:
    """The encoder's output as keys (B * H, dk, Lm), values (B * H, Lm, dk), bias (B * H, 1, Lm)."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    sources: int

    @staticmethod
    def of(attention: Attention, memory: Tensor, mask: Tensor | None) -> _Memory:
        keys, values = attention.of_memory(memory)
        sources, heads, length, _ = keys.shape
        bias = None if mask is None else mask.expand(sources, heads, 1, length).flatten(0, 1)
        return _Memory(keys.flatten(0, 1).mT, values.flatten(0, 1), bias, sources)

    def attended(self, query: Tensor) -> Tensor:
        """softmax(q k^T + bias) v of queries (R, H * dk), R a multiple of B."""
        heads, width = self.keys.shape[0] // self.sources, self.keys.shape[1]
        rows, each = query.shape[0], query.shape[0] // self.sources
        if each > 1:
            query = query.view(self.sources, each, heads, width).transpose(1, 2)
        query = query.reshape(self.keys.shape[0], each, width)
        scores = (
            torch.bmm(query, self.keys)
            if self.bias is None
            else torch.baddbmm(self.bias, query, self.keys)
        )
        mixed = torch.bmm(scores.softmax(-1), self.values)
        if each > 1:
            mixed = mixed.view(self.sources, heads, each, width).transpose(1, 2)
        return mixed.reshape(rows, heads * width)


@dataclass(frozen=True)
class _Layer:
    """One block: its products for a number of rows, and the keys and values of the memory."""

    block: Block
    attention_norm: _Norm
    cross_norm: _Norm
    mlp_norm: _Norm
    q: Product
    k: Product
    v: Product
    o: Product
    cross_q: Product
    cross_o: Product
    memory: _Memory
    wi: tuple[Product, ...] = ()
    wo: Product | None = None
    alone: bool = False

    @staticmethod
    def of(block: Block, memory: Tensor, mask: Tensor | None, rows: int) -> _Layer:
        own, cross, mlp = block.attention, block.cross_attention, block.mlp
        layer = _Layer(
            block=block,
            attention_norm=_Norm.of(block.attention_norm),
            cross_norm=_Norm.of(block.cross_norm),
            mlp_norm=_Norm.of(block.mlp_norm),
            q=own.q.prepared(rows),
            k=own.k.prepared(rows),
            v=own.v.prepared(rows),
            o=own.o.prepared(rows),
            cross_q=cross.q.prepared(rows),
            cross_o=cross.o.prepared(rows),
            memory=_Memory.of(cross, memory, mask),
        )
        if isinstance(mlp, MoE):
            return replace(layer, alone=rows == 1 and _keeps_its_pair(mlp))
        inner = (mlp.wi_0, mlp.wi_1) if mlp.gated else (mlp.wi,)
        wi = tuple(linear.prepared(rows) for linear in inner)
        return replace(layer, wi=wi, wo=mlp.wo.prepared(rows))

    def attend(
        self, x: Tensor, new: Sequence[Tensor], keys: Tensor, values: Tensor, bias: Tensor
    ) -> None:
        """Add self-attention to x (R, D). new: where key and value (R, H * dk) go; keys (R * H, dk,
        L), values (R * H, L, dk): all of them, the new ones included; bias: (R * H, 1, L).
        """
        normed = self.attention_norm(x)
        self.k(normed, new[0])
        self.v(normed, new[1])
        query = self.q(normed).view(keys.shape[0], 1, -1)
        weights = torch.baddbmm(bias, query, keys).softmax(-1)
        self.o.add_to(x, torch.bmm(weights, values).view(x.shape[0], -1))

    def attend_memory(self, x: Tensor) -> None:
        """Add cross-attention to x (R, D)."""
        if self.memory.keys.shape[2]:
            self.cross_o.add_to(x, self.memory.attended(self.cross_q(self.cross_norm(x))))

    def feed_forward(self, x: Tensor, token_ids: Tensor) -> None:
        """Add the MLP, dense or sparse, to x (R, D)."""
        mlp, normed = self.block.mlp, self.mlp_norm(x)
        if self.alone and isinstance(mlp, MoE):
            expert, weight = mlp.router.alone(normed)
            x.add_(mlp.experts.alone(normed, expert), alpha=weight)
            return
        if isinstance(mlp, MoE):
            y, _ = mlp(normed.unsqueeze(1), token_ids=token_ids)
            x += y.squeeze(1)
            return
        assert self.wo is not None
        hidden = self.wi[0](normed)
        hidden = hidden.relu_() if mlp.function is F.relu else mlp.function(hidden)
        if mlp.gated:
            hidden = hidden.mul_(self.wi[1](normed))
        self.wo.add_to(x, hidden)
