"""Batches of a text for verbs that run a checkpoint on one: span corruption, as in pre-training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from moezoo.config import SwitchConfig
    from moezoo.tokenizer import BaseTokenizer
    from moezoo.training.corpus import Document

Batch = dict[str, "Tensor"]


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, its tokenizer, and how much of it."""
    parser.add_argument("--text", nargs="+", help="text, JSONL, CSV or TSV files (Python's docs)")
    parser.add_argument("--text-field", default="text", help="field of JSONL, CSV, TSV (text)")
    add_tokenizer_argument(parser)
    parser.add_argument("--batches", type=int, default=8, help="to run (8)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per batch (16)")
    parser.add_argument("--length", type=int, default=128, help="tokens per source (128)")


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """What every verb that reads text takes."""
    parser.add_argument(
        "--tokenizer",
        help="a directory, spiece.model, tokenizer.json or bytes (default: the source's)",
    )


def named_tokenizer(named: str | None, source: str, config: SwitchConfig) -> BaseTokenizer:
    """The tokenizer that was named, or the one beside the checkpoint, fit for its model."""
    from moezoo.tokenizer import fitting_tokenizer

    return fitting_tokenizer(named or source, config)


def refuse_decoders(verb: str, source: str) -> None:
    """Raise ConfigError for a model of another architecture, whose pairs would be read in vain."""
    from moezoo.adapters.families import foreign_type
    from moezoo.adapters.formats.files import read_json
    from moezoo.errors import CheckpointError, ConfigError

    path = Path(source) / "config.json"
    try:
        kind = foreign_type(read_json(path))
    except CheckpointError:
        return  # which loading it explains
    if kind is not None:
        hint = "Use transformers' Trainer, as examples/07_upcycle_llama.py does."
        raise ConfigError(
            f"{verb} is for T5 and Switch models", path=path, field="model_type",
            found=repr(kind)[:80], hint=hint,
        )  # fmt: skip


def sample_documents(arguments: argparse.Namespace) -> list[Document]:
    """The text of the arguments. Raises ConfigError or CheckpointError."""
    from moezoo.errors import ConfigError
    from moezoo.training.corpus import file_documents, python_documents

    for name in ("batches", "batch_size", "length"):
        if getattr(arguments, name) < 1:
            flag, found = f"--{name.replace('_', '-')}", getattr(arguments, name)
            raise ConfigError(f"{flag} is at least 1", field=name, found=found)
    if arguments.text:
        return file_documents(arguments.text, field=arguments.text_field)
    return python_documents()[:200]


def watched(
    arguments: argparse.Namespace, label: str
) -> Callable[[Iterable[Tensor]], Iterator[Tensor]]:
    """What shows a progress bar while batches pass."""
    from moezoo.cli.terminal import Progress

    def passing(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        with Progress(arguments.batches, label) as progress:
            for batch in batches:
                yield batch
                progress.advance()

    return passing


def sample_batches(
    arguments: argparse.Namespace, tokenizer: BaseTokenizer, label: str
) -> Iterator[Batch]:
    """The batches, under a progress bar. Raises ConfigError or CheckpointError."""
    from moezoo.cli.terminal import Progress
    from moezoo.training.batches import packed_ids, span_corruption_batches
    from moezoo.training.span_corruption import SpanCorruption

    documents = sample_documents(arguments)
    batches = span_corruption_batches(
        packed_ids(documents, tokenizer),
        SpanCorruption(tokenizer),
        input_length=arguments.length,
        batch_size=arguments.batch_size,
    )
    with Progress(arguments.batches, label) as progress:
        for step in range(arguments.batches):
            yield batches(step)
            progress.advance()
