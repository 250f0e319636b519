"""`moezoo plan`: what an upcycling would do, from headers alone."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moezoo.cli.recipes import add_drop_heads, add_recipe_arguments, recipe_from


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", metavar="SRC", help="a dense checkpoint: T5, Llama, Qwen, ...")
    add_recipe_arguments(parser)
    add_drop_heads(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; a refusal is an error with its reason."""
    from moezoo.adapters.checkpoint_source import open_checkpoint
    from moezoo.adapters.plan import make_plan
    from moezoo.adapters.plan_summary import summary

    recipe = recipe_from(arguments)
    with open_checkpoint(arguments.source, drop_heads=arguments.drop_heads) as checkpoint:
        plan = make_plan(checkpoint, recipe, layout=arguments.layout)
        facts = summary(plan, checkpoint)
    print(json.dumps(facts, indent=2) if arguments.json else _table(facts))
    return 0


def _table(facts: dict[str, Any]) -> str:
    from moezoo.cli.terminal import duration, quantity, table

    rows = [
        (
            group["source"],
            group["count"],
            group["dtype"],
            " x ".join(map(str, group["shape"])),
            quantity(group["bytes_read"]) + "B",
            group["target"],
            group["init"],
            f"{group['scale']:g}",
            quantity(group["bytes_written"]) + "B",
        )
        for group in facts["groups"]
    ]
    header = ("source", "n", "dtype", "shape", "read", "target", "init", "scale", "written")
    held = "yes" if facts["expressible"] else f"no, because {facts['layout_reason']}"
    totals = [
        f"parameters            {facts['parameters']:,} ({facts['active_parameters']:,} per token)",
        f"read / written        {quantity(facts['bytes_read'])}B / "
        f"{quantity(facts['bytes_written'])}B",
        f"peak memory           about {quantity(facts['peak_memory'])}B"
        + ("" if facts["streams"] else ", torch included"),
        f"time                  about {duration(facts['seconds'])} at "
        f"{quantity(facts['disk_bytes_per_second'])}B/s, this disk's speed just now",
        f"left out              {_left_out(facts['left_out'])}",
        f"files copied          {', '.join(facts['carried']) or 'none: no tokenizer beside it'}",
        f"Hugging Face layout   {held}",
    ]
    return "\n".join([table(header, rows), "", *totals])


def _left_out(reasons: dict[str, str]) -> str:
    """Tensors of the source that are not converted, and why."""
    shown = [f"{name} ({reason})" for name, reason in list(reasons.items())[:6]]
    more = [f"and {len(reasons) - 6} more"] if len(reasons) > 6 else []
    return ", ".join([*shown, *more]) or "nothing"
