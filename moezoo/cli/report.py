"""`moezoo report`: what the experts of a checkpoint do on a text, as a table and as a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moezoo.cli.samples import add_sample_arguments, named_tokenizer, sample_batches


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="a Switch checkpoint with its tokenizer")
    add_sample_arguments(parser)
    parser.add_argument("--out", type=Path, help="HTML page to write")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Corrupt spans of the text, run the model on it, and print what its routers did."""
    from moezoo.adapters.checkpoint import load
    from moezoo.adapters.writer import check_place
    from moezoo.cli.terminal import table
    from moezoo.errors import ConfigError
    from moezoo.report.page import write_page
    from moezoo.report.routing import routing_report
    from moezoo.report.routing_page import HEADER, advice, rows, sections

    if arguments.out is not None:
        check_place(arguments.out)
    model: Any = load(arguments.source, task="conditional_generation")
    if not (model.config.encoder_sparse or model.config.decoder_sparse):
        hint = "`moezoo upcycle` makes a model with experts of it."
        reason = "a dense model, which has no experts to report on"
        raise ConfigError(reason, path=arguments.source, field="source", hint=hint)
    tokenizer = named_tokenizer(arguments.tokenizer, arguments.source, model.config)
    batches = sample_batches(arguments, tokenizer, "routing")
    report = routing_report(model, batches, tokenizer.piece)
    facts, said = rows(report), advice(report)
    if arguments.json:
        print(json.dumps([layer.to_dict() for layer in report], indent=1))
    else:
        print("\n".join([table(HEADER, facts), *said]))
    if arguments.out is not None:
        title = f"Routing of {arguments.source}"
        lead = "What stands out:" if said else "No layer stands out."
        page = write_page(
            arguments.out, title=title, lead=lead, notes=said, header=HEADER, rows=facts,
            sections=sections(report),
        )  # fmt: skip
        if not arguments.json:
            print(f"\nPage {page}")
    return 0
