"""`moezoo report`: what the experts of a checkpoint do, as a page, a table or JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.cli.samples import add_sample_arguments, named_tokenizer, sample_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moezoo.reporting.observation import Observation
    from moezoo.reporting.report import Report

FORMATS = ("html", "terminal", "json")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "source", nargs="?", metavar="MODEL",
        help="a checkpoint, or a sparse model of transformers; not for --run alone"
    )  # fmt: skip
    add_sample_arguments(parser)
    parser.add_argument("--pairs", help="sources and targets, JSONL, CSV or TSV, instead of a text")
    parser.add_argument("--task", default="pairs", help="of the pairs, as in finetune (pairs)")
    parser.add_argument("--source-field", help="of the pairs (the task's)")
    parser.add_argument("--target-field", help="of the pairs (the task's)")
    parser.add_argument("--prefix", help="put before every source (the task's)")
    parser.add_argument("--no-header", action="store_true", help="two columns, source and target")
    parser.set_defaults(num_beams=None, dataset=None)
    parser.add_argument("--ids", help="ids as JSON instead of a text; no tokenizer is needed")
    parser.add_argument("--run", metavar="RUN", help="a run directory: its curves are shown too")
    parser.add_argument("--against", metavar="OTHER", help="another checkpoint to compare with")
    parser.add_argument("--tokens", type=int, default=2000, help="of a text on the page (2000)")
    parser.add_argument("--out", type=Path, help="file to write: a page, or .json")
    parser.add_argument("--format", choices=FORMATS, default=None, help="of the output (terminal)")
    parser.add_argument("--json", action="store_true", help="the same as --format json")


def run(arguments: argparse.Namespace) -> int:
    """Run the model on the text, and show what its routers did."""
    from moezoo.adapters.writer import check_place
    from moezoo.errors import ConfigError

    if arguments.out is not None:
        check_place(arguments.out)
    form = "json" if arguments.json else arguments.format or "terminal"
    given = [name for name in ("text", "pairs", "ids") if getattr(arguments, name)]
    if len(given) > 1:
        hint = "Pass one of --text, --pairs and --ids."
        raise ConfigError("a report is of one text", field=given[1], hint=hint)
    made = _report(arguments)
    if arguments.out is not None:
        made.save(arguments.out)
    if form == "json":
        print(made.json())
    elif form == "html":
        if arguments.out is None:
            print(made.html(), end="")
    else:
        print(_shown(made))
    if arguments.out is not None and form != "json":
        print(f"\nPage {arguments.out}" if form == "terminal" else f"Page {arguments.out}")
    return 0


def _shown(made: Report) -> str:
    from moezoo.cli.terminal import table
    from moezoo.reporting.summary import HEADER, facts, rows

    found = rows(made.document)
    return "\n".join([*([table(HEADER, found)] if found else []), *facts(made.document)])


def _report(arguments: argparse.Namespace) -> Report:
    from moezoo.errors import ConfigError
    from moezoo.reporting.report import report

    if arguments.source is None:
        if arguments.run is None or arguments.against is not None:
            hint = "Name a checkpoint, or a run with --run."
            raise ConfigError("there is nothing to report on", field="MODEL", hint=hint)
        return report(None, run=arguments.run, title=f"Run {arguments.run}")
    seen = _of_transformers(arguments)
    if seen is not None:
        observation, piece = seen
        title = f"Routing of {arguments.source}"
        return report(
            observation, tokenizer=piece, run=arguments.run, tokens=arguments.tokens, title=title
        )
    model, other = _loaded(arguments.source), _against(arguments)
    tokenizer = None
    if arguments.tokenizer or not arguments.ids:
        tokenizer = named_tokenizer(arguments.tokenizer, arguments.source, model.config)
    return report(
        model, _batches(arguments, model, tokenizer), tokenizer=tokenizer, run=arguments.run,
        against=other, against_name=arguments.against or "", tokens=arguments.tokens,
        title=f"Routing of {arguments.source}",
    )  # fmt: skip


def _of_transformers(
    arguments: argparse.Namespace,
) -> tuple[Observation, Callable[[int], str]] | None:
    """What a directory that is none of moezoo's does on a text; None for any other source."""
    from moezoo.adapters.families import foreign_type
    from moezoo.errors import ConfigError, MissingExtra

    try:
        values = json.loads((Path(arguments.source) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # which loading it explains
    kind = foreign_type(values) if isinstance(values, dict) else None
    if kind is None:
        return None
    for name in ("pairs", "ids", "against"):
        if getattr(arguments, name):
            hint = f"Leave --{name} out."
            reason = f"--{name} is for models of moezoo, this is a {kind}"
            raise ConfigError(reason, field=name, hint=hint)
    try:
        from moezoo.adapters.hf.directory import record_text
    except ModuleNotFoundError as error:
        raise MissingExtra(f"a {kind} model", error.name or "transformers", extra="hf") from None
    from moezoo import traces
    from moezoo.cli.samples import sample_documents, watched
    from moezoo.reporting.observation import Observation

    found = record_text(
        arguments.source,
        [document.text for document in sample_documents(arguments)],
        tokenizer=arguments.tokenizer,
        batches=arguments.batches,
        batch_size=arguments.batch_size,
        length=arguments.length,
        watch=watched(arguments, "routing"),
    )
    ids = {name: tuple(calls) for name, calls in found.ids.items()}
    return Observation(traces.of(found.tape, probs=True), ids, ours=False), found.piece


def _loaded(source: str) -> Any:
    from moezoo.adapters.checkpoint import load

    return load(source, task="conditional_generation")


def _against(arguments: argparse.Namespace) -> Any:
    return None if arguments.against is None else _loaded(arguments.against)


def _batches(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Iterable[Any]:
    if arguments.ids:
        from moezoo.reporting.given_ids import id_batches

        config = model.config
        return id_batches(
            arguments.ids, pad_id=config.pad_token_id, start_id=config.decoder_start_token_id,
            batch_size=arguments.batch_size,
        )  # fmt: skip
    if arguments.pairs:
        from moezoo.training.batches import pair_batches
        from moezoo.training.evaluation import chosen_task, given_pairs

        task = chosen_task(arguments)
        pairs = given_pairs(arguments, {"source": task.source, "target": task.target})
        made = pair_batches(
            pairs or [], tokenizer, batch_size=arguments.batch_size, prefix=task.prefix,
            max_source=arguments.length, max_target=arguments.length,
        )  # fmt: skip
        return (made.of_all(step) for step in range(min(arguments.batches, made.batches_of_all)))
    return sample_batches(arguments, tokenizer, "routing")
