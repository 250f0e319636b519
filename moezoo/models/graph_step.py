"""A decoder's next token on a GPU: buffers that stay where they are, and one CUDA graph per size.

Eager decoding launches a thousand kernels per token, which take the host ten times as long as they
take the GPU. A graph launches them at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from moezoo.layer import MoE
from moezoo.models.cache import DecoderCache
from moezoo.models.decoding import Decoding
from moezoo.models.step import Step
from moezoo.ops.backends import never_waits

_KNOWN = ("moezoo.", "torch.nn.modules.")
_RECORDING = threading.Lock()  # a process may record one graph at a time


class FixedCache(DecoderCache):
    """Keys and values in buffers (2 * layers, R, H, size, dk), filled at a position that the device
    knows.
    """

    def __init__(self, buffers: Tensor) -> None:
        super().__init__()
        self.buffers = buffers
        self.position = torch.zeros(1, dtype=torch.int64, device=buffers.device)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put (R, H, 1, dk) at the position; all places (R, H, size, dk), later ones zero."""
        keys, values = self.buffers[2 * layer], self.buffers[2 * layer + 1]
        return (
            keys.index_copy_(2, self.position, key.to(keys.dtype)),
            values.index_copy_(2, self.position, value.to(values.dtype)),
        )


class GraphStep(Step):
    """A step on one GPU: what calling the decoder's modules launches, replayed.

    Of modules whose Python code does nothing else, in buffers of which it reads every place.

    Args:
        model, memory, memory_mask, rows: see `Step`.
    """

    device = "cuda"
    first_size = 64
    worth_from = 8
    graph: torch.cuda.CUDAGraph | None = None

    def __init__(
        self, model: Decoding, memory: Tensor, memory_mask: Tensor | None, *, rows: int
    ) -> None:
        super().__init__(model, memory, memory_mask, rows=rows)
        start = model.config.decoder_start_token_id
        self.token = torch.full((rows, 1), start, device=memory.device)
        self.cache = FixedCache(self.places)
        self.logits = self._recorded()

    def _run(self, token_ids: Tensor) -> Tensor:
        self.token.copy_(token_ids)
        self.cache.position.fill_(self.length)
        self._replay()
        return self.logits

    def _hidden(self, x: Tensor, token_ids: Tensor) -> Tensor:
        bias = None
        place_S = torch.arange(self.size, device=x.device)
        # The bias of the last place is that of any other, moved: what comes later is masked.
        moved_S = (place_S + (self.size - 1 - self.cache.position)).clamp_(max=self.size - 1)
        later_S = place_S > self.cache.position
        for block in self.blocks:
            last = self.biases.get(block.attention.layer)
            if last is not None:
                lowest = torch.finfo(last.dtype).min
                bias = last.index_select(3, moved_S).masked_fill_(later_S, lowest)
            x, _, _ = block(
                x,
                bias,
                token_ids=token_ids,
                memory=self.memory,
                memory_bias=self.memory_bias,
                cache=self.cache,
            )
        hidden: Tensor = self.model.decoder.final_norm(x)[:, -1]
        return hidden

    def _grow(self) -> None:
        super()._grow()
        self.cache.buffers = self.places
        self.cache.position.fill_(self.length)
        self.graph = None  # its memory is there for the next
        self.logits = self._recorded()

    def _replay(self) -> None:
        """Write the logits of `token` at the position into `logits`."""
        assert self.graph is not None
        self.graph.replay()

    @classmethod
    def _parts(cls, model: Decoding) -> Iterable[nn.Module]:
        return (part for name, part in model.named_children() if name != "encoder")

    @classmethod
    def _passed_by(cls, model: Decoding) -> Iterator[nn.Module]:
        for part in cls._parts(model):
            yield from part.modules()

    @classmethod
    def _knows(cls, kind: type[nn.Module]) -> bool:
        return kind.__module__.startswith(_KNOWN)

    @classmethod
    def _suits(cls, model: Decoding, memory: Tensor) -> bool:
        own_head = "head" in vars(model) or not type(model).head.__module__.startswith(_KNOWN)
        if own_head or torch.cuda.is_current_stream_capturing():
            return False
        return not _waits(cls._passed_by(model), memory)

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
                    self._logits(self.token)
            torch.cuda.current_stream().wait_stream(aside)
            # Other threads may go on allocating and waiting.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                logits = self._logits(self.token)
        self.graph = graph
        return logits


def _waits(modules: Iterable[nn.Module], memory: Tensor) -> bool:
    """Whether some sparse layer may make the host wait for the device. It is not for the recording
    to find out: one that fails leaves the random numbers of the device unusable.
    """
    layers = [module for module in modules if isinstance(module, MoE)]
    parts = (part for m in layers for part in (m.router, m.capacity, m.experts))
    return bool(layers) and (any(part.waits for part in parts) or not never_waits(memory))
