"""A decoder's next token on a CPU, on weights that are looked up once per `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.functional.dropout import Dropout
from moezoo.layer import MoE
from moezoo.models.attention import Attention
from moezoo.models.block import Block
from moezoo.models.decoding import Decoding
from moezoo.models.embedding import Embedding
from moezoo.models.feed_forward import DenseMLP
from moezoo.models.norm import RMSNorm
from moezoo.models.position import PositionBias
from moezoo.models.stack import Stack
from moezoo.models.step import Step

_KNOWN = (Stack, Block, Attention, DenseMLP, RMSNorm, PositionBias, Dropout, nn.ModuleList)


class Product(Protocol):
    """A linear map of few rows that is called many times."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...

    def add_to(self, total: Tensor, x: Tensor) -> None: ...


class HostStep(Step):
    """What a decoder computes for one new token a row, float32 on a CPU, by a third of the
    operators and a seventh of the Python calls that its modules take. Embeddings, the head and
    sparse layers are called, but for a sparse layer that `takes_lone_row`.
    """

    device = "cpu"
    first_size = 32

    def __init__(
        self, model: Decoding, memory: Tensor, memory_mask: Tensor | None, *, rows: int
    ) -> None:
        super().__init__(model, memory, memory_mask, rows=rows)
        self.layers = [_Layer.of(block, memory, self.memory_bias, rows) for block in self.blocks]
        self.final_norm = _Norm.of(model.decoder.final_norm)
        # Tensors of inference mode must not reach the hooks of a sparse layer, which may keep them.
        self.unseen = not any(isinstance(layer.mlp, _Called) for layer in self.layers)

    def reorder(self, rows: Tensor) -> None:
        # In the order of memory: two thirds of the time that it takes in that of `places`.
        filled = self.places.permute(0, 3, 1, 2, 4)[:, : self.length]
        filled.copy_(filled.index_select(2, rows))

    def _hidden(self, x: Tensor, token_ids: Tensor) -> Tensor:
        x, end = x.squeeze(1), self.length + 1
        new = self.cache[:, self.length].view(self.cache.shape[0], self.rows, -1).unbind(0)
        keys = self.cache[::2, :end].permute(0, 2, 3, 1).unbind(0)
        values = self.cache[1::2, :end].transpose(1, 2).unbind(0)
        biases = {layer: bias[:, :, -end:] for layer, bias in self.biases.items()}
        bias = biases[0]
        with torch.inference_mode() if self.unseen else torch.no_grad():
            for index, layer in enumerate(self.layers):
                bias = biases.get(index, bias)
                layer.attend(x, new[2 * index : 2 * index + 2], keys[index], values[index], bias)
                layer.attend_memory(x)
                layer.mlp(x, layer.mlp_norm(x), token_ids)
        return self.final_norm(x)

    def _allocate(self, size: int) -> None:
        super()._allocate(size)
        # (2 * layers, positions, R * H, dk) and (R * H, 1, size), the heads of all rows as one.
        self.cache = self.places.permute(0, 3, 1, 2, 4).flatten(2, 3)
        self.biases = {n: bias[0].repeat(self.rows, 1, 1) for n, bias in self.biases.items()}

    def _zeros(self, sizes: tuple[int, ...]) -> Tensor:
        # What a token adds is one piece of memory per layer.
        layers, rows, heads, size, width = sizes
        return self.memory.new_zeros(layers, size, rows, heads, width).permute(0, 2, 3, 1, 4)

    @classmethod
    def _parts(cls, model: Decoding) -> Iterable[nn.Module]:
        return (model.decoder,)

    @classmethod
    def _passed_by(cls, model: Decoding) -> Iterator[nn.Module]:
        blocks = (block for block in model.decoder.blocks if type(block) is Block)
        called = {id(block.mlp) for block in blocks if block.sparse}
        yield from _outside(model.decoder, called)

    @classmethod
    def _knows(cls, kind: type[nn.Module]) -> bool:
        return kind in _KNOWN or "prepared" in vars(kind)  # not inherited beside another `forward`

    @classmethod
    def _suits(cls, model: Decoding, memory: Tensor) -> bool:
        return all(x.dtype == torch.float32 for x in (memory, *model.decoder.parameters()))


def _outside(module: nn.Module, called: Set[int]) -> Iterator[nn.Module]:
    """A module and those in it, but for those of the given ids and embeddings, which are called."""
    yield module
    for child in module.children():
        if type(child) is not Embedding and id(child) not in called:
            yield from _outside(child, called)


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
class _Dense:
    """A dense MLP."""

    wi: tuple[Product, ...]
    wo: Product
    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, normed: Tensor, token_ids: Tensor) -> None:
        """Add what it makes of normed (R, D) to x (R, D)."""
        hidden = self.wi[0](normed)
        hidden = hidden.relu_() if self.function is F.relu else self.function(hidden)
        if len(self.wi) > 1:
            hidden = hidden.mul_(self.wi[1](normed))
        self.wo.add_to(x, hidden)


@dataclass(frozen=True)
class _Lone:
    """A sparse layer that is passed by: one row, and one expert for it."""

    layer: MoE

    def __call__(self, x: Tensor, normed: Tensor, token_ids: Tensor) -> None:
        y, weight = self.layer.lone_row(normed)
        x.add_(y, alpha=weight)


@dataclass(frozen=True)
class _Called:
    """A sparse layer, or what a tool has put into its place."""

    layer: nn.Module

    def __call__(self, x: Tensor, normed: Tensor, token_ids: Tensor) -> None:
        y, _ = self.layer(normed.unsqueeze(1), mask=None, token_ids=token_ids)
        x += y.squeeze(1)


def _mlp_of(block: Block, rows: int) -> _Dense | _Lone | _Called:
    mlp = block.mlp
    if block.sparse:
        lone = rows == 1 and type(mlp) is MoE and mlp.takes_lone_row()
        return _Lone(cast(MoE, mlp)) if lone else _Called(mlp)
    dense = cast(DenseMLP, mlp)
    inner = (dense.wi_0, dense.wi_1) if dense.gated else (dense.wi,)
    wi = tuple(linear.prepared(rows) for linear in inner)
    return _Dense(wi, dense.wo.prepared(rows), dense.function)


@dataclass(frozen=True)
class _Layer:
    """One block: its products for a number of rows, and the keys and values of the memory."""

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
    mlp: _Dense | _Lone | _Called

    @staticmethod
    def of(block: Block, memory: Tensor, mask: Tensor | None, rows: int) -> _Layer:
        own, cross = block.attention, block.cross_attention
        return _Layer(
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
            mlp=_mlp_of(block, rows),
        )

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
