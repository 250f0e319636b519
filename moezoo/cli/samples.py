"""Batches of a text for verbs that run a checkpoint on one: span corruption, as in pre-training."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from moezoo.config import SwitchConfig
    from moezoo.tokenizer import BaseTokenizer

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


def sample_batches(
    arguments: argparse.Namespace, tokenizer: BaseTokenizer, label: str
) -> Iterator[Batch]:
    """The batches, under a progress bar. Raises ConfigError or CheckpointError."""
    from moezoo.cli.terminal import Progress
    from moezoo.errors import ConfigError
    from moezoo.training.batches import packed_ids, span_corruption_batches
    from moezoo.training.corpus import file_documents, python_documents
    from moezoo.training.span_corruption import SpanCorruption

    if arguments.batches < 1:
        raise ConfigError("--batches is at least 1", field="batches", found=arguments.batches)
    field = arguments.text_field
    documents = (
        file_documents(arguments.text, field=field) if arguments.text else python_documents()[:200]
    )
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
