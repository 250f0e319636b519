"""`moezoo trace`: where the tokens of a text go, as a file for `shrink` and for `moezoo.traces`."""

from __future__ import annotations

import argparse
from typing import Any

from moezoo.cli.parser import add_output
from moezoo.cli.samples import add_sample_arguments, named_tokenizer, sample_batches


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="a Switch checkpoint with its tokenizer")
    add_output(parser, "target", text="the file to write, such as routing.safetensors")
    add_sample_arguments(parser)
    parser.add_argument(
        "--probs", action="store_true", help="keep the probabilities of every expert too"
    )
    parser.add_argument("--device", default="cpu", help="such as cuda (cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Run the model on spans of the text that are corrupted as in pre-training, and record it."""
    import torch

    from moezoo import traces
    from moezoo.adapters.checkpoint import load
    from moezoo.adapters.writer import check_place
    from moezoo.recording import record

    check_place(arguments.target)
    model: Any = load(arguments.source, task="conditional_generation", device=arguments.device)
    tokenizer = named_tokenizer(arguments.tokenizer, arguments.source, model.config)
    with torch.no_grad(), record(model) as tape:
        for batch in sample_batches(arguments, tokenizer, "trace"):
            model(**{name: tensor.to(arguments.device) for name, tensor in batch.items()})
    trace = traces.of(tape, probs=arguments.probs)
    trace.save(arguments.target)
    print(f"{arguments.target}: {len(trace.by_layer)} layers in {arguments.batches} batches")
    return 0
