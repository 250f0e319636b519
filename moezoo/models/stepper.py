"""Scores of the next token, by the fastest way that a model, a device and a prompt allow.

Ranks that hold parts of one model step together: whoever is done steps on, for nothing, until all
are.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.functional.collective import num_ranks, summed_over_ranks
from moezoo.functional.shards import is_sharded
from moezoo.models.cache import DecoderCache
from moezoo.models.decoding import Decoding
from moezoo.models.graph_step import GraphStep
from moezoo.models.host_step import HostStep
from moezoo.models.step import Step

STEPS: tuple[type[Step], ...] = (HostStep, GraphStep)


class Stepper:
    """Scores of the next token for a batch of prefixes, rows of a source side by side.

    Args:
        memory, real: the encoder's output (B, Lm, D) and its real tokens (B, Lm).
        rows: R, a multiple of B.
        prompt_real: (R, L) real tokens of what the decoder begins with; None: all.
        tokens: how many to expect.
    """

    def __init__(
        self,
        model: Decoding,
        memory: Tensor,
        real: Tensor | None,
        *,
        rows: int,
        prompt_real: Tensor | None = None,
        use_cache: bool,
        tokens: int = 0,
    ) -> None:
        self.model, self.memory, self.real, self.rows = model, memory, real, rows
        self.prompt_real, self.table = prompt_real, model.decoder.table(model.shared)
        self.cache = DecoderCache() if use_cache else None
        self.together = num_ranks() > 1 and is_sharded(cast(nn.Module, model))
        apart = use_cache and rows > 0 and prompt_real is None
        self.step = self._fitting(tokens) if apart else None

    def scores(self, ids: Tensor) -> Tensor:
        """float32 logits (R, V) of the token after ids (R, L); L grows by one with every call.

        They may be overwritten by the next call.
        """
        if self.together:
            self._stepping(1)
        if self.step is None or self.step.length != ids.shape[1] - 1:
            return self._by_modules(ids)
        return self.step(ids[:, -1:])

    def reorder(self, rows: Tensor) -> None:
        """Continue from the given rows of the batch."""
        if self.step is not None:
            self.step.reorder(rows)
        elif self.cache is not None:
            self.cache.reorder(rows)

    def finish(self) -> None:
        """Step on until every rank is done; every rank must call it once."""
        while self.together and self._stepping(0):
            source, real = self.memory[:1], None if self.real is None else self.real[:1]
            first = torch.zeros(source.shape[0], 1, dtype=torch.int64, device=source.device)
            self.model.decoder(
                self.table(first), None, token_ids=first, memory=source, memory_mask=real
            )

    def _stepping(self, own: int) -> int:
        """How many ranks take a step of their own now."""
        return int(summed_over_ranks(torch.tensor(own, device=self.memory.device)))

    def _by_modules(self, ids: Tensor) -> Tensor:
        """What the decoder's modules say; a step goes on from there."""
        new = ids if self.cache is None else ids[:, self.cache.length :]
        real = self.prompt_real
        if real is not None:
            real = F.pad(real, (0, ids.shape[1] - real.shape[1]), value=True)
        hidden, _ = self.model.decoder(
            self.table(new),
            real,
            token_ids=new,
            memory=self.memory,
            memory_mask=self.real,
            cache=self.cache,
        )
        if self.step is not None and self.cache is not None:
            self.step.resume(self.cache)
            self.cache = None
        return self.model.head(hidden[:, -1]).float()

    def _fitting(self, tokens: int) -> Step | None:
        for kind in STEPS:
            if tokens >= kind.worth_from and kind.fits(self.model, self.memory):
                try:
                    return kind(self.model, self.memory, self.real, rows=self.rows)
                except torch.OutOfMemoryError:  # a graph keeps memory of its own
                    return None
        return None
