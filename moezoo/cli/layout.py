"""`moezoo layout`: a model over many GPUs, before any is rented."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moezoo.layouts import Layout

_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", help="a name of `moezoo list`, or a checkpoint directory")
    parser.add_argument("--gpus", type=int, required=True, help="how many, in whole nodes")
    parser.add_argument("--memory", required=True, help='of each GPU, as "80GB"')
    parser.add_argument("--optimizer", default="adam", help="adam or adafactor (adam)")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of source and of target, each, a GPU (8192)"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (512)")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node (8)")
    parser.add_argument(
        "--keep", action="store_true", help="keep all activations: recompute nothing in backward"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, every layout in it")


def run(arguments: argparse.Namespace) -> int:
    """Print the best layout in its parts and the next ones with the reason."""
    from moezoo.cli.info import model_of
    from moezoo.layouts import Machine, plan

    config, task = model_of(arguments.model)
    layouts = plan(
        config,
        gpus=arguments.gpus,
        memory=arguments.memory,
        optimizer=arguments.optimizer,
        tokens=arguments.tokens,
        length=arguments.length,
        task=task,
        recompute=not arguments.keep,
        machine=Machine(node=arguments.node),
    )
    if arguments.json:
        print(json.dumps(_facts(arguments, layouts), indent=2))
    else:
        print("\n".join(_lines(arguments, layouts)))
    return 0


def _facts(arguments: argparse.Namespace, layouts: list[Layout]) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "optimizer": arguments.optimizer,
        "tokens": arguments.tokens,
        "length": arguments.length,
        "recompute": not arguments.keep,
        "layouts": [{**layout.to_dict(), "name": arguments.model} for layout in layouts],
    }


def _lines(arguments: argparse.Namespace, layouts: list[Layout]) -> list[str]:
    from moezoo.cli.terminal import table

    best, *others = layouts
    kept = "all activations kept" if arguments.keep else "blocks computed again in backward"
    some = f"{_some(arguments.gpus, 'GPU')} of {arguments.memory}"
    said = [
        f"{arguments.model} on {some}, {arguments.optimizer}",
        f"{arguments.tokens:,} source and as many target tokens a GPU, {kept}",
        "",
        f"{'best' if best.fits else 'nearest'}: {_named(best)}",
        f"{_size(best.memory.total)} of {_size(best.limit)} that tensors may fill",
        best.reason,
        f"{best.expert_parameters:,} expert weights on each GPU, "
        f"{best.dense_parameters(0):,} others on rank 0",
        "",
        table(("of a GPU", "", "what it is"), _rows(best)),
    ]
    if others:
        rows = [_other(layout) for layout in others[:_SHOWN]]
        header = ("ep", "dp", "dense", "memory", "wire", "step", "the next ones")
        said += ["", table(header, rows)]
    if len(others) > _SHOWN:
        said.append(f"and {len(others) - _SHOWN} more: --json has all")
    return [*said, "", "Reckoned, not measured: docs/layouts.md says how."]


def _rows(layout: Layout) -> list[tuple[str, str, str]]:
    """Every figure in its parts; a part that is nothing is left out."""
    from moezoo.layouts import span

    rows = []
    for name, whole, said, parts in _FIGURES:
        figure = getattr(layout, name)
        shown = span if name == "time" else _size
        rows.append((whole, shown(figure.total), said))
        for part, of_part in parts.items():
            if getattr(figure, part):
                rows.append((f"  {part}", shown(getattr(figure, part)), of_part))
    return rows


_FIGURES: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "memory",
        "memory",
        "of rank 0, which holds the most",
        {
            "experts": "weights, gradients, state of the optimizer",
            "dense": "the same, of all that is no expert",
            "copies": "gathered weights, gradients to reduce",
            "activations": "kept for backward",
            "peak": "cross entropy, or a block computed again",
            "exchange": "rows on their way to experts",
            "context": "CUDA and NCCL",
        },
    ),
    (
        "wire",
        "wire",
        "sent per step",
        {
            "rows": "tokens to experts and back",
            "dense": "gathered weights, reduced gradients",
            "experts": "the same, over dp",
        },
    ),
    (
        "time",
        "step",
        "gathers beside the products, then the rest",
        {
            "compute": "matrix products",
            "gathers": "of weights and gradients",
            "rows": "all-to-all",
            "optimizer": "its pass over memory",
        },
    ),
]


def _other(layout: Layout) -> tuple[object, ...]:
    from moezoo.layouts import span

    return (
        layout.ep,
        layout.dp,
        layout.dense_over,
        _size(layout.memory.total),
        _size(layout.wire.total),
        span(layout.time.total),
        layout.reason,
    )


def _named(layout: Layout) -> str:
    where = _some(layout.dense_over, "GPU")
    copies = layout.gpus // layout.dense_over
    replicas = f", {copies} replicas" if copies > 1 else ""
    return f"ep {layout.ep}, dp {layout.dp}, dense weights over {where}{replicas}"


def _some(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(size: float) -> str:
    from moezoo.cli.terminal import quantity

    return quantity(size) + "B"
