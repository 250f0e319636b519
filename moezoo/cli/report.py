"""`moezoo report`: what the experts of a checkpoint do on a text, as a table and as a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from moezoo.cli.terminal import Progress

Batch = dict[str, "Tensor"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="a Switch checkpoint with its tokenizer")
    parser.add_argument("--text", nargs="+", help="text or JSONL files (Python's documentation)")
    parser.add_argument("--tokenizer", help="spiece.model or a directory (default: the source's)")
    parser.add_argument("--out", type=Path, help="HTML page to write")
    parser.add_argument("--batches", type=int, default=8, help="to run (8)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per batch (16)")
    parser.add_argument("--length", type=int, default=128, help="tokens per source (128)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Corrupt spans of the text, run the model on it, and print what its routers did."""
    from moezoo.adapters.checkpoint import load
    from moezoo.cli.terminal import Progress, table
    from moezoo.errors import ConfigError
    from moezoo.report.page import write_page
    from moezoo.report.routing import routing_report
    from moezoo.report.routing_page import HEADER, advice, rows, sections
    from moezoo.tokenizer import tokenizer_of
    from moezoo.training.batches import packed_ids, span_corruption_batches
    from moezoo.training.corpus import file_documents, python_documents
    from moezoo.training.span_corruption import SpanCorruption

    if arguments.batches < 1:
        raise ConfigError("--batches is at least 1", field="batches", found=arguments.batches)
    model = load(arguments.source, task="conditional_generation")
    tokenizer = tokenizer_of(arguments.tokenizer or arguments.source)
    documents = file_documents(arguments.text) if arguments.text else python_documents()[:200]
    batches = span_corruption_batches(
        packed_ids(documents, tokenizer),
        SpanCorruption(tokenizer),
        input_length=arguments.length,
        batch_size=arguments.batch_size,
    )
    with Progress(arguments.batches, "  routing") as progress:
        steps = (batches(step) for step in range(arguments.batches))
        report = routing_report(model, _counted(steps, progress), tokenizer.piece)
    facts, said = rows(report), advice(report)
    if arguments.json:
        print(json.dumps([layer.to_dict() for layer in report], indent=1))
    else:
        print("\n".join([table(HEADER, facts), *said]))
    if arguments.out is not None:
        title, lead = f"Routing of {arguments.source}", " ".join(said) or "No layer stands out."
        page = write_page(
            arguments.out, title=title, lead=lead, header=HEADER, rows=facts,
            sections=sections(report),
        )  # fmt: skip
        if not arguments.json:
            print(f"\nPage {page}")
    return 0


def _counted(batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        progress.advance()
