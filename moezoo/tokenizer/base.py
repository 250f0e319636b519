"""What every tokenizer is, and rows of ids as a batch."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.errors import ConfigError, TokenizerError


@dataclass(frozen=True)
class Batch:
    """Padded ids (B, L) int64 and their mask (B, L), 1 for real tokens."""

    input_ids: Tensor
    attention_mask: Tensor


class BaseTokenizer(ABC):
    """Text to ids and back, with the special ids that its files name.

    Args:
        path: where it comes from, for messages.
        files: what `save` writes, by name.
        pad_id, eos_id: None where no file says one; asking for it is then an error.
        sentinels: the ids of the masked spans of pre-training, in the order of their use.
        special: further ids that `decode` leaves out.
    """

    unk_id: int | None = None  # what stands for text that has no id; bytes have no such text
    mean_span = 3.0  # of the span corruption that the family was pre-trained with

    def __init__(
        self,
        path: Path | None,
        *,
        files: Mapping[str, bytes],
        pad_id: int | None,
        eos_id: int | None,
        sentinels: Sequence[int],
        special: Iterable[int],
    ) -> None:
        self.path = path
        self.files = dict(files)
        self._pad_id, self._eos_id = pad_id, eos_id
        self._sentinels = tuple(sentinels)
        self._hidden = {*sentinels, *special} | {n for n in (pad_id, eos_id) if n is not None}

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the highest id; a model's embedding may be larger (T5 pads to 32128)."""

    @abstractmethod
    def encode(self, text: str, *, eos: bool = True) -> list[int]:
        """Ids of a text, closed by eos."""

    @abstractmethod
    def decode(self, ids: Iterable[int] | Tensor, *, skip_special: bool = True) -> str:
        """Text of ids; special tokens and sentinels are left out or, without skip_special,
        written.
        """

    @abstractmethod
    def piece(self, number: int) -> str:
        """What one id stands for."""

    @property
    def num_sentinels(self) -> int:
        """How many masked spans a text can have."""
        return len(self._sentinels)

    def sentinel(self, index: int) -> int:
        """The id that stands for the masked span `index`. Raises ConfigError past the last one."""
        if not 0 <= index < self.num_sentinels:
            wanted = f"0 to {self.num_sentinels - 1}"
            raise ConfigError("no such sentinel", field="index", expected=wanted, found=index)
        return self._sentinels[index]

    @property
    def pad_id(self) -> int:
        """What fills up a batch. Raises TokenizerError where no file says it."""
        return self._said("pad", self._pad_id)

    @property
    def eos_id(self) -> int:
        """What closes a text. Raises TokenizerError where no file says it."""
        return self._said("eos", self._eos_id)

    def batch(self, texts: Sequence[str], *, max_length: int | None = None) -> Batch:
        """Encode, truncate (eos stays last) and pad texts."""
        rows = [truncated(self.encode(text), max_length) for text in texts]
        return padded(rows, value=self.pad_id)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into a directory, those that it was read from byte for
        byte.
        """
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)

    def adopt(self, *, pad_id: int, eos_id: int) -> None:
        """Take a model's special ids for those that no file names; what the model pads with is left
        out of decoded text in any case.
        """
        self._pad_id = pad_id if self._pad_id is None else self._pad_id
        self._eos_id = eos_id if self._eos_id is None else self._eos_id
        self._hidden |= {pad_id, self._eos_id}

    def _said(self, role: str, number: int | None) -> int:
        if number is None:
            hint = f"Say {role}_token in tokenizer_config.json or {role}_token_id in config.json."
            raise TokenizerError(f"no file names the {role} token", path=self.path, hint=hint)
        return number


def padded(rows: Sequence[Sequence[int]], *, value: int) -> Batch:
    """Rows of ids as one batch, filled up on the right with `value`."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), value, dtype=torch.int64, device="cpu")
    mask = torch.zeros((len(rows), length), dtype=torch.int64, device="cpu")
    for row, numbers in enumerate(rows):
        ids[row, : len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
        mask[row, : len(numbers)] = 1
    return Batch(ids, mask)


def truncated(ids: list[int], max_length: int | None) -> list[int]:
    """At most `max_length` ids; what is cut keeps its last id (eos)."""
    if max_length is None or len(ids) <= max_length:
        return ids
    if max_length < 1:
        raise ConfigError("max_length is at least 1", field="max_length", found=max_length)
    return [*ids[: max_length - 1], ids[-1]]


def integers(ids: Iterable[int] | Tensor) -> list[int]:
    """Ids as plain integers."""
    return ids.tolist() if isinstance(ids, Tensor) else [int(number) for number in ids]


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """A small JSON file."""
    return (json.dumps(values, indent=2) + "\n").encode()
