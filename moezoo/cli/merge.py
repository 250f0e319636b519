"""`moezoo merge`: fine-tuned models of one shape become experts."""

from __future__ import annotations

import argparse

from moezoo.cli.recipes import add_drop_heads, add_recipe_arguments, recipe_from
from moezoo.cli.upcycle import add_calibration, calibration


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add = parser.add_argument
    add("sources", metavar="SRC", nargs="+", help="dense checkpoints of one shape")
    add("--out", metavar="OUT", required=True, help="the directory to write")
    add_recipe_arguments(parser)
    add_calibration(parser)
    add_drop_heads(parser)
    add("--overwrite", action="store_true", help="replace what is at OUT")


def run(arguments: argparse.Namespace) -> int:
    """Write the merged model; by default one expert per model."""
    from moezoo.adapters.upcycle.merge import merge
    from moezoo.cli.signals import orderly_termination

    if arguments.num_experts is None and not arguments.recipe:
        arguments.num_experts = len(arguments.sources)
    arguments.init = arguments.init or "branches"
    recipe = recipe_from(arguments)
    with orderly_termination():
        path = merge(
            arguments.sources,
            arguments.out,
            recipe,
            layout=arguments.layout,
            overwrite=arguments.overwrite,
            drop_heads=arguments.drop_heads,
            calibration=calibration(arguments.sources[0], arguments),
        )
    print(f"{path}: {recipe.num_experts} experts from {len(arguments.sources)} models")
    return 0
