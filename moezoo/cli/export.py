"""`moezoo export`: another layout or dtype, or one expert as a dense model."""

from __future__ import annotations

import argparse

from moezoo.cli.parser import add_output
from moezoo.cli.recipes import add_drop_heads


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add = parser.add_argument
    add("source", metavar="SRC", help="any checkpoint")
    add_output(parser, "target", text="the directory to write")
    add("--layout", default="auto", help="auto (default), huggingface or moezoo")
    add("--dtype", help="float32, bfloat16 or float16; default: as it is")
    add("--expert", type=int, help="a dense model with this expert in every sparse layer")
    add("--wo-scale", type=float, help="factor on wo to undo; default: of the upcycling; 1: none")
    add("--fold", action="store_true", help="unit weight as transformers' Switch, almost exactly")
    add("--max-shard-size", default="5GB", help="such as 5GB (default)")
    add("--allow-nonfinite", action="store_true", help="write NaN and infinity too")
    add("--vocab-size", type=int, metavar="N", help="rows of every table of tokens and of the head")
    add_drop_heads(parser)
    add("--overwrite", action="store_true", help="replace what is at OUT")


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint anew."""
    from moezoo.adapters.upcycle.export import export
    from moezoo.cli.signals import orderly_termination

    with orderly_termination():
        path = export(
            arguments.source,
            arguments.target,
            layout=arguments.layout,
            dtype=arguments.dtype,
            expert=arguments.expert,
            wo_scale=arguments.wo_scale,
            max_shard_size=arguments.max_shard_size,
            vocab_size=arguments.vocab_size,
            fold=arguments.fold,
            drop_heads=arguments.drop_heads,
            overwrite=arguments.overwrite,
            allow_nonfinite=arguments.allow_nonfinite,
        )
    print(f"{path}: written")
    return 0
