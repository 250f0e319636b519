"""A decoder's next token, again and again: what holds however and on whatever it is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from moezoo.models.attention import key_mask
from moezoo.models.block import Block
from moezoo.models.cache import DecoderCache
from moezoo.models.decoding import Decoding
from moezoo.models.stack import Stack
from moezoo.ops.eager import is_eager
from moezoo.ops.observed import is_observed, is_plain_tensor


class Step(ABC):
    """Logits of the next token, token by token, as calling `model.decoder` with a cache and the
    head gives them.

    A kind of step says what hidden states it computes and which modules it passes by. Keys and
    values are in buffers of its own, which double when full.

    Args:
        model: one that the class `fits`.
        memory, memory_mask: the encoder's output and its real tokens, as in `Stack.forward`; `rows`
            is a multiple of memory's.
    """

    device: ClassVar[str]
    first_size: ClassVar[int]  # of the buffers, in tokens
    worth_from: ClassVar[int] = 0  # tokens: making one takes as long as a few of them

    def __init__(
        self, model: Decoding, memory: Tensor, memory_mask: Tensor | None, *, rows: int
    ) -> None:
        self.model, self.memory, self.rows = model, memory, rows
        self.blocks = cast("list[Block]", list(model.decoder.blocks))
        self.table = model.decoder.table(model.shared)
        self.memory_bias = key_mask(memory_mask, memory.dtype)
        self.length = 0
        self._allocate(self.first_size)

    @classmethod
    def fits(cls, model: Decoding, memory: Tensor) -> bool:
        """Whether it computes what the modules would: no gradient is wanted and operators run at
        once, outside autocast, on plain weights that are where the memory is; and each module that
        it passes by is of a kind that it knows, in evaluation, and observed by nobody.
        """
        if memory.device.type != cls.device or torch.is_grad_enabled() or not is_eager():
            return False
        if torch.is_autocast_enabled(cls.device) or type(model.decoder) is not Stack:
            return False
        weights = (weight for part in cls._parts(model) for weight in part.parameters())
        if not all(is_plain_tensor(w) and w.device == memory.device for w in weights):
            return False
        if not all(map(cls._is_plain, cls._passed_by(model))):
            return False
        return cls._suits(model, memory)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """float32 logits (R, V) after the next tokens (R, 1); the next call may overwrite them."""
        if self.length == self.size:
            self._grow()
        logits = self._run(token_ids)
        self.length += 1
        return logits

    @property
    def size(self) -> int:
        """Tokens that the buffers have room for."""
        return self.places.shape[3]

    def reorder(self, rows: Tensor) -> None:
        """Continue from the given rows."""
        filled = self.places[:, :, :, : self.length]
        filled.copy_(filled.index_select(1, rows))

    def resume(self, cache: DecoderCache) -> None:
        """Go on after the tokens of another cache of the same rows."""
        while self.size < cache.length:
            self._grow()
        self.length = cache.length
        for layer, pair in cache.self_attention.items():
            for place, kept in enumerate(pair, 2 * layer):
                self.places[place, :, :, : self.length] = kept[:, :, : self.length]

    def _run(self, token_ids: Tensor) -> Tensor:
        """The logits, by whatever drives the step."""
        return self._logits(token_ids)

    def _logits(self, token_ids: Tensor) -> Tensor:
        hidden = self._hidden(self.table(token_ids), token_ids)
        logits: Tensor = self.model.head(hidden).float()
        return logits

    @abstractmethod
    def _hidden(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Hidden states (R, D) of embeddings (R, 1, D), which may be used up, after the norm."""

    def _grow(self) -> None:
        old = self.places
        self._allocate(2 * self.size)
        self.places[:, :, :, : self.length] = old[:, :, :, : self.length]

    def _allocate(self, size: int) -> None:
        """`places`: keys and values (2 * layers, R, H, size, dk). `biases`: by layer that has a
        table, that of the last of `size` positions (1, H, 1, size), whose last columns are those
        of the positions before.
        """
        attention, device = self.blocks[0].attention, self.memory.device
        sizes = (self.rows, attention.num_heads, size, attention.d_kv)
        self.places = self._zeros((2 * len(self.blocks), *sizes))
        self.biases: dict[int, Tensor] = {}
        for block in self.blocks:
            row = block.attention.relative_bias(1, size, offset=size - 1, device=device)
            if row is not None:
                self.biases[block.attention.layer] = row.to(self.memory.dtype)

    def _zeros(self, sizes: tuple[int, ...]) -> Tensor:
        """Zeros (2 * layers, R, H, size, dk), in memory as the step reads them fastest."""
        return self.memory.new_zeros(sizes)

    @classmethod
    @abstractmethod
    def _parts(cls, model: Decoding) -> Iterable[nn.Module]:
        """What it reads weights of."""

    @classmethod
    @abstractmethod
    def _passed_by(cls, model: Decoding) -> Iterable[nn.Module]:
        """The modules whose calls it does without."""

    @classmethod
    def _is_plain(cls, module: nn.Module) -> bool:
        known = cls._knows(type(module))
        return known and not module.training and not is_observed(module, whole=True)

    @classmethod
    @abstractmethod
    def _knows(cls, kind: type[nn.Module]) -> bool:
        """Whether it computes what a module of exactly this class does."""

    @classmethod
    @abstractmethod
    def _suits(cls, model: Decoding, memory: Tensor) -> bool:
        """What else must hold."""
