"""`moezoo plan`: what an upcycling would do, from headers alone."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
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
    from moezoo.cli.terminal import duration, quantity

    held = facts["layout"] if facts["expressible"] else f"no, because {facts['layout_reason']}"
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
        *([f"files not copied      {_some(facts['not_carried'])}"] if facts["not_carried"] else []),
        f"Hugging Face layout   {held}",
    ]
    if facts["router_choice"]:
        totals.append(f"router                {facts['router_choice']}")
    return "\n".join([_groups(facts["groups"]), "", *(_fitted(line) for line in totals)])


def _groups(groups: list[dict[str, Any]]) -> str:
    """Like tensors in a row; below it what becomes of those that are not carried as they are."""
    from moezoo.cli.terminal import quantity, table

    rows = [
        (
            _short("new: " + group["target"] if group["source"] == "-" else group["source"]),
            group["count"],
            " x ".join(map(str, group["shape"])),
            group["dtype"],
            quantity(group["bytes_read"]) + "B",
            quantity(group["bytes_written"]) + "B",
        )
        for group in groups
    ]
    header, rule, *lines = table(
        ("tensor", "n", "shape", "dtype", "read", "written"), rows
    ).splitlines()
    for index, group in reversed(list(enumerate(groups))):
        note = [group["init"]] if group["init"] != "-" else []
        note += [f"times {group['scale']:g}"] if group["scale"] != 1 else []
        if group["source"] not in ("-", group["target"]):
            lines.insert(
                index + 1, f"  -> {', '.join([_short(group['target'], beside=25), *note])}"
            )
        elif note:
            lines.insert(index + 1, f"  {', '.join(note)}")
    return "\n".join([header, rule, *lines])


def _short(name: str, *, beside: int = 38) -> str:
    """A name that leaves room for what stands beside it, its middle left out where it must be."""
    from moezoo.cli.terminal import width

    name = name.removesuffix(".weight")
    room = max(width() - beside, 30) if sys.stdout.isatty() else len(name)
    half = (room - 1) // 2
    return name if len(name) <= room else f"{name[:half]}\u2026{name[-half:]}"


def _fitted(line: str) -> str:
    """A line of facts, broken at the terminal's width under its second column."""
    from moezoo.cli.terminal import width

    room = width() if sys.stdout.isatty() else len(line) + 1
    return textwrap.fill(line, room, subsequent_indent=" " * 22, break_on_hyphens=False)


def _left_out(reasons: dict[str, str]) -> str:
    """Tensors of the source that are not converted, and why."""
    return _some([f"{name} ({reason})" for name, reason in reasons.items()]) or "nothing"


def _some(names: list[str]) -> str:
    more = [f"and {len(names) - 6} more"] if len(names) > 6 else []
    return ", ".join([*names[:6], *more])
