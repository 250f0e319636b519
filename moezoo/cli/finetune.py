"""`moezoo finetune`: fine-tuning on pairs, with generation and metrics on a held-out split."""

from __future__ import annotations

import argparse

from moezoo.cli.parser import add_output
from moezoo.cli.ranks import joined
from moezoo.cli.samples import add_tokenizer_argument, refuse_decoders
from moezoo.cli.terminal import complain
from moezoo.cli.train import add_dataset_argument, add_run_arguments, watched


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="a checkpoint with its tokenizer, dense or Switch")
    add_output(parser, "out", text="directory of the run; its model ends up in OUT/model")
    add_tokenizer_argument(parser)
    add_task_arguments(parser)
    parser.add_argument(
        "--held-out-pairs", help="file of pairs to evaluate on (default: every tenth of the others)"
    )
    parser.add_argument(
        "--examples", type=int, default=200, help="held-out pairs to generate for (200)"
    )
    add_run_arguments(parser, recipe="finetune")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which pairs there are and how they are fed."""
    parser.add_argument(
        "--task",
        default="pairs",
        help="pairs, translation, summarization, or a toy task: identifiers, docstrings",
    )
    parser.add_argument("--pairs", help="JSONL, CSV or TSV file of pairs")
    parser.add_argument(
        "--no-header", action="store_true", help="CSV or TSV of two columns: source, then target"
    )
    add_dataset_argument(parser)
    parser.add_argument("--source-field", help="field of the source (the task's)")
    parser.add_argument("--target-field", help="field of the target (the task's)")
    parser.add_argument("--prefix", help="put before every source (the task's)")
    parser.add_argument("--num-beams", type=int, help="of generation (the task's)")


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune, then generate for held-out sources and print the metrics."""
    with joined(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from moezoo.training.batches import pair_batches, unknown_targets
    from moezoo.training.corpus import fingerprint
    from moezoo.training.evaluation import chosen_task, measurable, report, task_pairs
    from moezoo.training.session import execute, prepared

    refuse_decoders("finetune", arguments.source)
    task = chosen_task(arguments)
    train, held = task_pairs(arguments, task)
    task = measurable(task, complain)
    session = prepared(arguments)

    def batches(pairs: list[tuple[str, str]], seed: int):  # type: ignore[no-untyped-def]
        return pair_batches(
            pairs,
            session.tokenizer,
            batch_size=arguments.batch_size,
            prefix=task.prefix,
            max_source=task.max_source,
            max_target=task.max_target,
            seed=seed,
        )

    train_batches = batches(train, arguments.seed)
    count, first = unknown_targets(train_batches, session.tokenizer.unk_id)
    if first is not None:
        complain(
            f"warning: {count} of {len(train)} targets hold text that the vocabulary lacks, which "
            f"the model cannot learn to write, such as {train[first][1][:60]!r}"
        )
    data = fingerprint(text for pair in [*train, *held] for text in pair)
    facts = {"task": arguments.task, "pairs": len(train), "prefix": task.prefix, "data": data}
    held_out = batches(held, arguments.seed + 1) if held else None
    with watched(arguments, session, held_out or train_batches) as on_step:
        code = execute(session, train_batches, held_out, arguments, facts, on_step=on_step)
    if code == 0 and held:
        report(session.model, session.tokenizer, held[: arguments.examples], task)
    return code
