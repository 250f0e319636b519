"""`moezoo downcycle`: the dense model inside an upcycled one."""

from __future__ import annotations

import argparse

from moezoo.cli.parser import add_output


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", metavar="SRC", help="an upcycled checkpoint")
    add_output(parser, "target", text="the directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT")


def run(arguments: argparse.Namespace) -> int:
    """Write the dense checkpoint."""
    from moezoo.adapters.upcycle.downcycling import downcycle_checkpoint
    from moezoo.cli.signals import orderly_termination

    with orderly_termination():
        path = downcycle_checkpoint(
            arguments.source, arguments.target, overwrite=arguments.overwrite
        )
    print(f"{path}: the dense model")
    return 0
