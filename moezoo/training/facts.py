"""Closed-book facts: a task that nothing but parameters can learn, so capacity shows in minutes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moezoo.errors import ConfigError
from moezoo.training.batches import keyed_generator

SYMBOLS = 32
RELATIONS = 8
VALUES = 64
NAME_LENGTH = 3
_FIRST = 2  # 0 is padding, 1 closes a sequence
_RELATION = _FIRST + SYMBOLS
_VALUE = _RELATION + RELATIONS
VOCAB_SIZE = _VALUE + VALUES


class Facts:
    """`count` random facts: a name of three symbols and a relation -> one of 64 values.

    A fact is six bits that follow from nothing else: what a model recalls it has stored in its
    weights. There is nothing to hold out, and no overfitting; recall is measured on the facts
    themselves (as in arXiv 2002.08910 questions are answered without a text).

    Args:
        count: up to 32^3 x 8 facts. seed: of the facts and of their order.
        batch_size: facts per batch.

    Attributes: sources (count, 5) and targets (count, 1) ids; sources are closed by eos.
    """

    def __init__(self, count: int, *, batch_size: int = 512, seed: int = 0) -> None:
        most = SYMBOLS**NAME_LENGTH * RELATIONS
        if not 1 <= count <= most:
            raise ConfigError("no such number of facts", field="count", expected=f"1 to {most}")
        if not 1 <= batch_size <= count:
            wanted = f"1 to {count}"
            raise ConfigError("bad batch size", field="batch_size", expected=wanted)
        generator = keyed_generator(seed, "facts", 0)
        question = torch.randperm(most, generator=generator)[:count]
        columns = [_RELATION + question % RELATIONS]
        name = question // RELATIONS
        for _ in range(NAME_LENGTH):
            columns.insert(0, _FIRST + name % SYMBOLS)
            name = name // SYMBOLS
        answer = _VALUE + torch.randint(VALUES, (count,), generator=generator)
        eos = torch.ones(count, dtype=torch.int64)
        self.sources = torch.stack([*columns, eos], dim=1)
        self.targets = answer[:, None]
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    @property
    def bits(self) -> float:
        """What a model that recalls everything has stored."""
        return self.count * math.log2(VALUES)

    @property
    def batches_per_epoch(self) -> int:
        return self.count // self.batch_size

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Batch `step`: input_ids, attention_mask (B, 5), labels (B, 1); every epoch reshuffled."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if self._order[0] != epoch:
            generator = keyed_generator(self.seed, "order", epoch)
            self._order = (epoch, torch.randperm(self.count, generator=generator))
        start = position * self.batch_size
        rows = self._order[1][start : start + self.batch_size]
        return self._batch(rows)

    def _batch(self, rows: Tensor) -> dict[str, Tensor]:
        sources = self.sources[rows]
        return {
            "input_ids": sources,
            "attention_mask": torch.ones_like(sources),
            "labels": self.targets[rows],
        }

    @torch.no_grad()
    def recall(self, model: nn.Module, *, most: int = 8192) -> float:
        """The share of facts (of the first `most`) whose value is the model's likeliest token."""
        was_training = model.training
        model.eval()
        count, right = min(most, self.count), 0
        for start in range(0, count, 4096):
            batch = self._batch(torch.arange(start, min(start + 4096, count)))
            logits = model(**batch).logits[:, 0]
            right += int((logits.argmax(-1) == batch["labels"][:, 0]).sum())
        model.train(was_training)
        return right / count
