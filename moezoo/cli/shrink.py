"""`moezoo shrink`: fewer experts, merged or pruned by use."""

from __future__ import annotations

import argparse

from moezoo.cli.parser import add_output


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add = parser.add_argument
    add("source", metavar="SRC", help="a sparse checkpoint")
    add_output(parser, "target", text="the directory to write")
    add("--experts", type=int, required=True, help="experts per sparse layer that remain")
    add("--trace", metavar="FILE", help="a saved routing trace: how much each expert was used")
    add("--method", default="merge", help="merge (default): join likes; prune: drop the unused")
    add("--overwrite", action="store_true", help="replace what is at OUT")


def run(arguments: argparse.Namespace) -> int:
    """Write the smaller model."""
    from moezoo import traces
    from moezoo.adapters.upcycle.shrink import shrink
    from moezoo.cli.signals import orderly_termination

    trace = traces.load(arguments.trace) if arguments.trace else None
    with orderly_termination():
        path = shrink(
            arguments.source,
            arguments.target,
            num_experts=arguments.experts,
            trace=trace,
            method=arguments.method,
            overwrite=arguments.overwrite,
        )
    print(f"{path}: {arguments.experts} experts per sparse layer")
    return 0
