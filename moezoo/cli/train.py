"""`moezoo train`: pre-training by span corruption, from scratch or from a checkpoint."""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.cli.parser import add_output
from moezoo.cli.ranks import add_rank_arguments, joined
from moezoo.cli.samples import add_tokenizer_argument
from moezoo.cli.settings import FromFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moezoo.training.batches import Batches
    from moezoo.training.loop import StepRecord
    from moezoo.training.session import Session

_ROWS = 8  # of a batch that a page shows while the run trains


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_output(parser, "out", text="directory of the run; its model ends up in OUT/model")
    parser.add_argument("--from", dest="source", help="a checkpoint to go on from, dense or Switch")
    parser.add_argument("--model", help="a name of `moezoo list`, to start from scratch")
    parser.add_argument("--config", help="a JSON file of SwitchConfig fields, from scratch")
    add_tokenizer_argument(parser)
    parser.add_argument("--text", nargs="*", default=[], help="text, JSONL, CSV, TSV files")
    parser.add_argument(
        "--python-text", action="store_true", help="the English within Python itself"
    )
    add_dataset_argument(parser)
    parser.add_argument("--text-field", default="text", help="field of a row (text)")
    parser.add_argument("--input-length", type=int, default=512, help="tokens per source (512)")
    parser.add_argument("--noise-density", type=float, default=0.15, help="share masked (0.15)")
    parser.add_argument(
        "--mean-span", type=float, help="tokens per masked span (the pre-training's: 3; bytes 20)"
    )
    add_run_arguments(parser, recipe="pretrain")


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """A source that both training verbs have."""
    parser.add_argument(
        "--dataset", help="a data set of Hugging Face's datasets, NAME[:SPLIT], or a saved one"
    )


def add_run_arguments(parser: argparse.ArgumentParser, *, recipe: str) -> None:
    """What every training verb takes."""
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps in all")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per batch (16)")
    parser.add_argument("--settings", action=FromFile, help="TOML or JSON of flags; flags win")
    parser.add_argument("--recipe", default=recipe, help=f"a named recipe ({recipe})")
    parser.add_argument("--teacher", help="a Switch checkpoint to distil, see docs/training.md")
    parser.add_argument("--teacher-weight", type=float, help="its share of the loss (0.25)")
    parser.add_argument(
        "--label-smoothing", type=float, help="share of every target that goes to all tokens (0)"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of SwitchConfig"
    )
    _add_optimizer_arguments(parser)
    parser.add_argument(
        "--autocast", choices=("bfloat16",), help="mixed precision; routers stay in float32"
    )
    parser.add_argument("--dropout", type=float, help="dropout rate of the model (the recipe's)")
    parser.add_argument("--expert-dropout", type=float, help="of the experts (the paper: 0.4)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="time for memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    parser.add_argument("--device", default="cpu", help="such as cuda (cpu)")
    parser.add_argument("--tensorboard", action="store_true", help="scalars in OUT/tensorboard")
    parser.add_argument(
        "--watch", action="store_true", help="a page of the run while it trains, for this machine"
    )  # fmt: skip
    parser.add_argument(
        "--nonfinite", choices=("stop", "skip"), default="stop", help="on a NaN (stop)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random number (0)")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps (500)")
    parser.add_argument("--save-every", type=int, default=500, help="steps (500)")
    parser.add_argument("--table-every", type=int, default=50, help="steps per row (50)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--resume-from", type=int, metavar="STEP", help="go on from an earlier checkpoint"
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="go on with other settings than before"
    )
    add_rank_arguments(parser)


def _add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), help="the recipe's")
    parser.add_argument("--learning-rate", type=float, help="the peak (the recipe's)")
    parser.add_argument(
        "--schedule",
        choices=("constant", "linear", "inverse_sqrt", "t5"),
        help="of the rate after the warm-up (the recipe's)",
    )
    parser.add_argument(
        "--warmup", type=int, help="steps of a linear rise; t5: at the peak (the recipe's)"
    )
    parser.add_argument("--expert-learning-rate", type=float, help="factor for experts (1)")
    parser.add_argument("--router-learning-rate", type=float, help="factor for routers (1)")
    parser.add_argument("--clip", type=float, help="maximal gradient norm (1); 0: none")
    parser.add_argument("--accumulate", type=int, help="batches per step (1)")


def run(arguments: argparse.Namespace) -> int:
    """Train and print where the model is."""
    with joined(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from moezoo.training.batches import packed_ids, span_corruption_batches
    from moezoo.training.corpus import fingerprint, split
    from moezoo.training.session import execute, prepared
    from moezoo.training.span_corruption import SpanCorruption

    documents = _documents(arguments)
    train, held = split(documents)
    session = prepared(arguments, vocabulary_from=[d.text for d in train])
    corruption = SpanCorruption(
        session.tokenizer, density=arguments.noise_density, mean_span=arguments.mean_span
    )

    def batches(part: Any, seed: int) -> Any:
        return span_corruption_batches(
            packed_ids(part, session.tokenizer),
            corruption,
            input_length=arguments.input_length,
            batch_size=arguments.batch_size,
            seed=seed,
        )

    facts = {
        "text": sorted(Path(path).name for path in arguments.text),
        "dataset": arguments.dataset,
        "python_text": arguments.python_text,
        "input_length": arguments.input_length,
        "noise_density": corruption.density,
        "mean_span": corruption.span_length,
    }
    seen = batches(train, arguments.seed)
    held_out = batches(held, arguments.seed + 1) if held else None
    with watched(arguments, session, held_out or seen) as on_step:
        return execute(
            session,
            seen,
            held_out,
            arguments,
            facts | {"data": fingerprint(d.text for d in documents)},
            on_step=on_step,
        )


@contextmanager
def watched(
    arguments: argparse.Namespace, session: Session, batches: Batches
) -> Iterator[Callable[[StepRecord], None] | None]:
    """With --watch a page of the run while the block runs; gives what is called after each step."""
    if not arguments.watch:
        yield None
        return
    from moezoo.cli.terminal import complain
    from moezoo.reporting.live import Live, served

    # A compiled block calls no hook, so that nothing could be seen of its routing.
    model = None if arguments.compile else session.model
    batch = {name: rows[:_ROWS] for name, rows in batches(0).items()}
    live = Live(arguments.out, model=model, batch=batch, tokenizer=session.tokenizer)
    with served(live) as address:
        complain(f"watch this run at {address}")
        yield lambda _: live.after_step()


def _documents(arguments: argparse.Namespace) -> list[Any]:
    """The text of all sources. Raises ConfigError where there is none."""
    from moezoo.errors import ConfigError
    from moezoo.training.corpus import file_documents, python_documents
    from moezoo.training.datasets import dataset_documents

    if not (arguments.text or arguments.python_text or arguments.dataset):
        hint = "Pass --text, --dataset or --python-text."
        raise ConfigError("no text to train on", field="text", hint=hint)
    field = arguments.text_field
    documents = file_documents(arguments.text, field=field) if arguments.text else []
    documents += dataset_documents(arguments.dataset, field=field) if arguments.dataset else []
    return documents + (python_documents() if arguments.python_text else [])
