"""Batches as a function of the step: a resumed run needs a seed and a number, nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.tokenizer import BaseTokenizer, padded, truncated
from moezoo.training.corpus import Document
from moezoo.training.span_corruption import SpanCorruption

Example = tuple[Sequence[int], Sequence[int]]
IGNORED = -100


class Batches(Protocol):
    """What the loop trains on: batch `step` is the same whenever it is asked for."""

    def __call__(self, step: int) -> dict[str, Tensor]: ...


class ExampleBatches:
    """Batches of source-target pairs, reshuffled every epoch.

    Args:
        count: number of examples. example: (index, epoch) -> source and target ids.
        batch_size: examples per batch. seed: of every order.
        pad_id: fills up sources. length_of: when given, batches are drawn from windows sorted by
            it, so that rows of a batch are of similar length and little is padding.
    """

    def __init__(
        self,
        count: int,
        example: Callable[[int, int], Example],
        *,
        batch_size: int,
        pad_id: int,
        seed: int = 0,
        length_of: Callable[[int], int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError("batch_size is at least 1", field="batch_size", found=batch_size)
        if count < 1:
            raise ConfigError("there is no example to train on", field="data", found=count)
        self.count, self.example, self.seed = count, example, seed
        self.batch_size = min(batch_size, count)
        self.pad_id = pad_id
        self.length_of = length_of
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def batches_per_epoch(self) -> int:
        return self.count // self.batch_size

    @property
    def batches_of_all(self) -> int:
        """Batches that it takes to see every example, a last short one included."""
        return -(-self.count // self.batch_size)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """input_ids, attention_mask (B, Ls) and labels (B, Lt), -100 where padded."""
        return self._batch(*divmod(step, self.batches_per_epoch))

    def of_all(self, step: int) -> dict[str, Tensor]:
        """Batch `step` of a pass that leaves no example out, for evaluation."""
        return self._batch(0, step)

    def _batch(self, epoch: int, position: int) -> dict[str, Tensor]:
        start = position * self.batch_size
        rows = [self.example(i, epoch) for i in self.order(epoch)[start : start + self.batch_size]]
        source = padded([source for source, _ in rows], value=self.pad_id)
        labels = padded([target for _, target in rows], value=IGNORED)
        return {
            "input_ids": source.input_ids,
            "attention_mask": source.attention_mask,
            "labels": labels.input_ids,
        }

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch in order; those of an incomplete batch come last."""
        if self._order[0] != epoch:
            generator = keyed_generator(self.seed, "order", epoch)
            order = torch.randperm(self.count, generator=generator, device="cpu").tolist()
            if self.length_of is not None:
                order = self._bucketed(order, generator)
            self._order = (epoch, order)
        return self._order[1]

    def _bucketed(self, order: list[int], generator: torch.Generator) -> list[int]:
        assert self.length_of is not None
        window = 32 * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=self.length_of)
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        mixed = torch.randperm(len(whole), generator=generator, device="cpu").tolist()
        rest = [i for batch in batches if len(batch) < self.batch_size for i in batch]
        return [i for index in mixed for i in whole[index]] + rest


def packed_ids(documents: Iterable[Document], tokenizer: BaseTokenizer) -> Tensor:
    """All documents as one row of ids (N,) int32, each closed by eos."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document.text)
    return torch.tensor(ids, dtype=torch.int32, device="cpu")


def span_corruption_batches(
    ids: Tensor,
    corruption: SpanCorruption,
    *,
    input_length: int,
    batch_size: int,
    seed: int = 0,
) -> ExampleBatches:
    """Batches of span corruption over packed ids (N,): sources of `input_length` tokens.

    Spans are drawn anew every epoch. Raises ConfigError when the text is shorter than one source.
    """
    length = corruption.chunk_length(input_length)
    count = ids.shape[0] // length
    if count < 1:
        raise ConfigError(
            "the text is shorter than one source",
            field="input_length",
            expected=f"at most {ids.shape[0]} tokens",
            found=length,
        )
    corruption.check_length(length)

    def example(index: int, epoch: int) -> Example:
        chunk = ids[index * length : (index + 1) * length]
        return corruption(chunk, keyed_generator(seed, f"noise {index}", epoch))

    pad_id = corruption.tokenizer.pad_id
    return ExampleBatches(count, example, batch_size=batch_size, pad_id=pad_id, seed=seed)


def pair_batches(
    pairs: Sequence[tuple[str, str]],
    tokenizer: BaseTokenizer,
    *,
    batch_size: int,
    prefix: str = "",
    max_source: int = 512,
    max_target: int = 128,
    seed: int = 0,
) -> ExampleBatches:
    """Batches of (source, target) texts, encoded once; rows of a batch are of similar length."""
    encoded = [
        (
            truncated(tokenizer.encode(prefix + source), max_source),
            truncated(tokenizer.encode(target), max_target),
        )
        for source, target in pairs
    ]
    return ExampleBatches(
        len(encoded),
        lambda index, epoch: encoded[index],
        batch_size=batch_size,
        pad_id=tokenizer.pad_id,
        seed=seed,
        length_of=lambda index: len(encoded[index][0]),
    )


def unknown_targets(batches: ExampleBatches, unk_id: int | None) -> tuple[int, int | None]:
    """How many targets hold text that the vocabulary lacks, and the index of the first of them."""
    if unk_id is None:
        return 0, None
    found = [i for i in range(batches.count) if unk_id in batches.example(i, 0)[1]]
    return len(found), found[0] if found else None


def keyed_generator(seed: int, name: str, epoch: int) -> torch.Generator:
    """A generator that belongs to a purpose and an epoch under a seed."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{epoch}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
