"""`moezoo upcycle`: a dense model on disk becomes a sparse one on disk."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moezoo.cli.parser import add_output
from moezoo.cli.recipes import add_drop_heads, add_recipe_arguments, recipe_from

if TYPE_CHECKING:
    from moezoo.adapters.upcycle.calibration import Calibration
    from moezoo.adapters.upcycle.convert import Verifier


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", metavar="SRC", help="a dense checkpoint: T5, Llama, Qwen, ...")
    add_output(parser, "target", text="the directory to write")
    add_recipe_arguments(parser)
    add = parser.add_argument
    add("--verify", action="store_true", help="verify before the result is put in place")
    add_drop_heads(parser)
    add("--overwrite", action="store_true", help="replace what is at OUT")
    add("--allow-nonfinite", action="store_true", help="convert NaN and infinity too")
    add_calibration(parser)
    add("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Convert, with a progress bar; leaves nothing behind when it fails or is stopped."""
    from moezoo.adapters.checkpoint_source import open_checkpoint
    from moezoo.adapters.plan import make_plan
    from moezoo.adapters.upcycle.convert import carry_out
    from moezoo.cli.signals import orderly_termination
    from moezoo.cli.terminal import Progress, duration, quantity, width

    recipe = recipe_from(arguments)
    with open_checkpoint(arguments.source, drop_heads=arguments.drop_heads) as checkpoint:
        plan = make_plan(checkpoint, recipe, layout=arguments.layout)
        total = plan.bytes_written
        bar = Progress(total, "upcycle", unit="B")
        with orderly_termination(), _short_turns(), bar as progress:
            report = carry_out(
                plan,
                checkpoint,
                arguments.target,
                overwrite=arguments.overwrite,
                allow_nonfinite=arguments.allow_nonfinite,
                calibration=calibration(arguments.source, arguments),
                verifier=_verifier(arguments) if arguments.verify else None,
                progress=progress.advance,
            )
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    print(f"{report.target}: {plan.parameters:,} parameters, {quantity(plan.bytes_written)}B, "
          f"{duration(report.seconds)}, layout {plan.layout}")  # fmt: skip
    if plan.router_choice:
        print(textwrap.fill(f"router: {plan.router_choice}", width()))
    if report.verification:
        print(report.verification)
    return 0


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Let threads that have read or written have the interpreter soon: in the five milliseconds
    that they would have to wait, a disk writes ten megabytes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _verifier(arguments: argparse.Namespace) -> Verifier:
    from moezoo.adapters.verify import require, verify

    def check(made: Path) -> str:
        return require(verify(made, arguments.source), arguments.target)

    return check


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The flags of sample text for routers that are fitted to it."""
    add = parser.add_argument
    add("--calibration", metavar="FILE", help="sample text, or a JSON list of prompts per expert")
    add("--device", default="cpu", help="where the model reads the sample text, such as cuda (cpu)")
    add("--inputs", choices=("model", "embeddings"), default="model",
        help="what routers are fitted to: what the dense model's layers read (model), or the "
        "embeddings of the text alone")  # fmt: skip


def calibration(source: str, arguments: argparse.Namespace) -> Calibration | None:
    """Sample text, by the tokenizer beside the source."""
    if arguments.calibration is None:
        return None
    from moezoo.adapters.upcycle.calibration import read_calibration

    directory = Path(source) if Path(source).is_dir() else Path(source).parent
    return read_calibration(
        arguments.calibration, directory, device=arguments.device, inputs=arguments.inputs
    )
