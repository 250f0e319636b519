"""Rows of a data set of Hugging Face's `datasets` (extra `train`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.errors import ConfigError, MissingExtra, did_you_mean
from moezoo.training.corpus import Document


def dataset_rows(name: str) -> Any:
    """The rows of NAME[:SPLIT], or of a directory that `save_to_disk` wrote; SPLIT is train unless
    said. Rows are read when they are asked for.

    Raises ConfigError where the library, the data set or the split is missing.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("--dataset", "datasets", extra="train") from None
    path, _, split = name.partition(":")
    try:
        if not Path(path).is_dir():
            return datasets.load_dataset(path, split=split or "train")
        found = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        reason = f"cannot load {path!r}: {str(error).splitlines()[0]}"
        raise ConfigError(reason, field="dataset") from None
    if not isinstance(found, datasets.DatasetDict):
        return found
    wanted = split or "train"
    if wanted not in found:
        hint = did_you_mean(wanted, found)
        raise ConfigError(f"{path!r} has no split {wanted!r}", field="dataset", hint=hint)
    return found[wanted]


def dataset_documents(name: str, *, field: str = "text") -> list[Document]:
    """A document per row. Raises ConfigError naming the field that a row lacks."""
    rows = dataset_rows(name)
    if field not in rows.column_names:
        hint = did_you_mean(field, rows.column_names)
        raise ConfigError(f"{name!r} has no field {field!r}", field="text_field", hint=hint)
    texts = enumerate(rows[field])
    return [Document(f"{name}:{i}", text) for i, text in texts if text and text.strip()]
