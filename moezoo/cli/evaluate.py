"""`moezoo evaluate`: loss and task metrics of a checkpoint on pairs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moezoo.cli.ranks import add_rank_arguments, joined
from moezoo.cli.samples import add_tokenizer_argument, named_tokenizer, refuse_decoders


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from moezoo.cli.finetune import add_task_arguments

    parser.add_argument("source", help="a checkpoint with its tokenizer")
    add_tokenizer_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--device", default="cpu", help="such as cuda (cpu)")
    add_task_arguments(parser)
    parser.add_argument("--examples", type=int, help="score so many pairs, the first ones (all)")
    add_rank_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics on the pairs that are given, or on those that a toy task holds out."""
    with joined(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from moezoo.cli.terminal import complain
    from moezoo.errors import ConfigError
    from moezoo.training.evaluation import (
        chosen_task,
        measurable,
        measured,
        report,
        scored_pairs,
    )
    from moezoo.training.sharding import load_over_ranks

    refuse_decoders("evaluate", arguments.source)
    task = chosen_task(arguments)
    if arguments.examples is not None and arguments.examples < 1:
        raise ConfigError("--examples is at least 1", field="examples", found=arguments.examples)
    chosen = scored_pairs(arguments, task)[: arguments.examples]
    task = measurable(task, complain)
    model: Any = load_over_ranks(
        arguments.source,
        device=arguments.device,
        ep=arguments.ep,
        precision=arguments.precision,
        hybrid=bool(arguments.hybrid),
    )
    tokenizer = named_tokenizer(arguments.tokenizer, arguments.source, model.config)
    if arguments.json:
        found, _ = measured(model, tokenizer, chosen, task)
        print(json.dumps(found, indent=2))
    else:
        report(model, tokenizer, chosen, task)
    return 0
