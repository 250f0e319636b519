"""`moezoo grow`: more experts, the same function."""

from __future__ import annotations

import argparse

from moezoo.cli.parser import add_output


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add = parser.add_argument
    add("source", metavar="SRC", help="a sparse checkpoint")
    add_output(parser, "target", text="the directory to write")
    add("--factor", type=int, default=2, help="how many times as many experts (2)")
    add("--seed", type=int, default=0, help="of the noise that tells twins apart (0)")
    add("--overwrite", action="store_true", help="replace what is at OUT")


def run(arguments: argparse.Namespace) -> int:
    """Write the larger model."""
    from moezoo.adapters.upcycle.grow import grow
    from moezoo.cli.signals import orderly_termination

    with orderly_termination():
        path = grow(
            arguments.source,
            arguments.target,
            factor=arguments.factor,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
        )
    print(f"{path}: {arguments.factor} times as many experts")
    return 0
