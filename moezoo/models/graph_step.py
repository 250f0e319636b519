"""A decoder's next token on a GPU: buffers that stay where they are, and one CUDA graph per size.

Eager decoding launches a thousand kernels per token, which take the host ten times as long as they
take the GPU. A graph launches them at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moezoo.layer import MoE
from moezoo.models.attention import key_mask
from moezoo.models.block import Block
from moezoo.models.cache import DecoderCache
from moezoo.models.decoding import Decoding
from moezoo.models.stack import Stack
from moezoo.ops.backends import never_waits
from moezoo.ops.eager import is_eager
from moezoo.ops.observed import is_observed

FIRST_SIZE = 64
_KNOWN = ("moezoo.", "torch.nn.modules.")
_RECORDING = threading.Lock()  # a process may record one graph at a time


def may_be_a_graph(model: Decoding, memory: Tensor) -> bool:
    """Whether a graph of a model's decoder computes what calling it would: on a GPU, in evaluation,
    of modules whose Python code does nothing else, without hooks, outside autocast and tracing.
    """
    if not memory.is_cuda or not is_eager() or torch.is_autocast_enabled("cuda"):
        return False
    if torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
        return False
    if type(model.decoder) is not Stack:
        return False
    if not type(model).head.__module__.startswith(_KNOWN) or "head" in vars(model):
        return False
    parts = [part for name, part in model.named_children() if name != "encoder"]
    if any(p.device != memory.device for part in parts for p in part.parameters()):
        return False
    modules = [module for part in parts for module in part.modules()]
    return all(map(_is_plain, modules)) and not _waits(modules, memory)


def _waits(modules: Sequence[nn.Module], memory: Tensor) -> bool:
    """Whether some sparse layer may make the host wait for the device. It is not for the recording
    to find out: one that fails leaves the random numbers of the device unusable.
    """
    layers = [module for module in modules if isinstance(module, MoE)]
    parts = (part for m in layers for part in (m.router, m.capacity, m.experts))
    return bool(layers) and (any(part.waits for part in parts) or not never_waits(memory))


def _is_plain(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(_KNOWN)
    return known and not module.training and not is_observed(module, whole=True)


class FixedCache(DecoderCache):
    """Keys and values in buffers of one size, filled at a position that the device knows.

    Args:
        layers, rows, heads, size, width: of buffers (2 * layers, rows, heads, size, width).
        like: whose dtype and device they have.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, size: int, width: int, *, like: Tensor
    ) -> None:
        super().__init__()
        self.buffers = like.new_zeros(2 * layers, rows, heads, size, width)
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put (R, H, 1, dk) at the position; all places (R, H, size, dk), later ones zero."""
        keys, values = self.buffers[2 * layer], self.buffers[2 * layer + 1]
        return (
            keys.index_copy_(2, self.position, key.to(keys.dtype)),
            values.index_copy_(2, self.position, value.to(values.dtype)),
        )

    def reorder(self, rows: Tensor) -> None:
        self.buffers.copy_(self.buffers.index_select(1, rows))


class GraphStep:
    """Logits of the next token, token by token, as calling `model.decoder` with a cache gives them.

    Args:
        model: one whose decoder `may_be_a_graph`, or on a CPU with `graph=False`.
        memory, memory_mask: the encoder's output and its real tokens, as in `Stack.forward`; `rows`
            is a multiple of memory's.
        graph: replay CUDA graphs; without, the same runs eagerly.
    """

    def __init__(
        self,
        model: Decoding,
        memory: Tensor,
        memory_mask: Tensor | None,
        *,
        rows: int,
        graph: bool = True,
    ) -> None:
        self.model, self.memory, self.graphed = model, memory, graph
        self.blocks = cast("list[Block]", list(model.decoder.blocks))
        self.table = model.decoder.table(model.shared)
        self.memory_bias = key_mask(memory_mask, memory.dtype)
        self.token = torch.full(
            (rows, 1), model.config.decoder_start_token_id, device=memory.device
        )
        self.length = 0
        self.cache = self._cache(FIRST_SIZE)
        self.biases = self._last_rows()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = self._recorded() if graph else memory

    def __call__(self, token_ids: Tensor) -> Tensor:
        """float32 logits (R, V) after the next tokens (R, 1); overwritten by the next call."""
        if self.length == self.cache.buffers.shape[3]:
            self._grow()
        self.token.copy_(token_ids)
        self.cache.position.fill_(self.length)
        if self.graph is None:
            self.logits = self._compute()
        else:
            self.graph.replay()
        self.length += 1
        return self.logits

    def reorder(self, rows: Tensor) -> None:
        """Continue from the given rows."""
        self.cache.reorder(rows)

    def resume(self, cache: DecoderCache) -> None:
        """Go on after the tokens of another cache of the same rows."""
        while self.cache.buffers.shape[3] < cache.length:
            self._grow()
        self.length = cache.length
        for layer, pair in cache.self_attention.items():
            for place, kept in enumerate(pair, 2 * layer):
                self.cache.buffers[place, :, :, : self.length] = kept[:, :, : self.length]

    def _compute(self) -> Tensor:
        x, bias = self.table(self.token), None
        place_S = torch.arange(self.cache.buffers.shape[3], device=x.device)
        # The bias of the last place is that of any other, moved: what comes later is masked.
        moved_S = (place_S + (place_S.shape[0] - 1 - self.cache.position)).clamp_(
            max=place_S.shape[0] - 1
        )
        later_S = place_S > self.cache.position
        for block in self.blocks:
            last = self.biases.get(block.attention.layer)
            if last is not None:
                lowest = torch.finfo(last.dtype).min
                bias = last.index_select(3, moved_S).masked_fill_(later_S, lowest)
            x, _, _ = block(
                x,
                bias,
                token_ids=self.token,
                memory=self.memory,
                memory_bias=self.memory_bias,
                cache=self.cache,
            )
        hidden = self.model.decoder.final_norm(x)
        logits: Tensor = self.model.head(hidden[:, -1]).float()
        return logits

    def _cache(self, size: int) -> FixedCache:
        attention = self.blocks[0].attention
        sizes = (attention.num_heads, size, attention.d_kv)
        return FixedCache(len(self.blocks), self.token.shape[0], *sizes, like=self.memory)

    def _last_rows(self) -> dict[int, Tensor]:
        """By layer that has a table: the bias (1, H, 1, size) of the last of `size` positions."""
        size, found = self.cache.buffers.shape[3], {}
        for block in self.blocks:
            row = block.attention.relative_bias(1, size, offset=size - 1, device=self.memory.device)
            if row is not None:
                found[block.attention.layer] = row.to(self.memory.dtype)
        return found

    def _grow(self) -> None:
        old = self.cache
        self.cache = self._cache(2 * old.buffers.shape[3])
        self.cache.cross_attention = old.cross_attention
        self.cache.buffers[:, :, :, : self.length] = old.buffers[:, :, :, : self.length]
        self.cache.position.fill_(self.length)
        self.biases = self._last_rows()
        if self.graphed:
            self.graph = None  # its memory is there for the next
            self.logits = self._recorded()

    def _recorded(self) -> Tensor:
        """Record the graph; the logits that it will write. What it computes on the way is written
        where the next token will write it again.
        """
        device = self.memory.device  # which need not be the current one
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(device):
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # allocates, compiles, looks up keys and values of the memory
                    self._compute()
            torch.cuda.current_stream().wait_stream(aside)
            # Other threads may go on allocating and waiting.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                logits = self._compute()
        self.graph = graph
        return logits
