"""Ids that are given as JSON: what a model reads where there is no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.errors import ConfigError, CorruptFile
from moezoo.tokenizer import padded
from moezoo.training.batches import IGNORED

_WANTED = '[[7, 8], [9]] or {"input_ids": [[7, 8]], "labels": [[9]]}'


def id_batches(
    path: str | Path, *, pad_id: int, start_id: int, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of a JSON file of ids: a list of sequences, or an object with `input_ids` and, if the
    decoder is to read targets, `labels`; without these it reads its start token alone.

    Raises CorruptFile for a file that is not so, ConfigError for a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError("--batch-size is at least 1", field="batch_size", found=batch_size)
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"no readable JSON: {error}", path=path) from None
    columns = given if isinstance(given, dict) else {"input_ids": given}
    unknown = sorted(set(columns) - {"input_ids", "labels"})
    if unknown or "input_ids" not in columns:
        key = unknown[0] if unknown else "input_ids"
        raise CorruptFile("ids have another form", path=path, key=key, expected=_WANTED)
    sources = _sequences(columns["input_ids"], "input_ids", path)
    targets = _sequences(columns["labels"], "labels", path) if "labels" in columns else None
    if targets is not None and len(targets) != len(sources):
        raise CorruptFile("not one target per source", path=path, key="labels",
                          expected=len(sources), found=len(targets))  # fmt: skip
    for start in range(0, len(sources), batch_size):
        rows = sources[start : start + batch_size]
        source = padded(rows, value=pad_id)
        batch = {"input_ids": source.input_ids, "attention_mask": source.attention_mask}
        if targets is None:
            batch["decoder_input_ids"] = torch.full((len(rows), 1), start_id, device="cpu")
        else:
            wanted = targets[start : start + batch_size]
            batch["labels"] = padded(wanted, value=IGNORED).input_ids
        yield batch


def _sequences(given: Any, key: str, path: str | Path) -> list[list[int]]:
    """Sequences of ids, each with one at least; a single one may stand alone."""
    rows = [given] if isinstance(given, list) and given and isinstance(given[0], int) else given
    if isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows):
        numbers = [number for row in rows for number in row]
        if all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in numbers):
            return rows
    raise CorruptFile("ids have another form", path=path, key=key, expected=_WANTED)
