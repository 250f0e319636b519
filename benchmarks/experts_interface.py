"""Experts of a Qwen3-MoE block (D 512, F 384) by each implementation of transformers, and ours.

    python -m benchmarks.experts_interface [--tokens 1 16 128 512 2048 8192] [--processor]

All implementations run in turns on the same weights, tokens and choices: "forward" without a
gradient, "training" forward and backward to tokens, weights of choices and parameters. As in a
model, whose layers take turns, calls go round blocks and choices of which no processor's cache
holds all weights. With
`--processor` the clock is that of the processor, for a machine that has other work. Writes
benchmarks/experts_interface.json and experts_interface.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.tables import machine, milliseconds, over_best, save, table
from moezoo.adapters.hf import register

WIDTH, HIDDEN = 512, 384
SIZES = ((8, 1), (8, 2), (64, 8), (128, 1), (128, 8))  # experts, choices of a token
OTHERS = ("eager", "grouped_mm", "batched_mm")
ROUND = 2**27  # bytes of weights that the calls of a round meet, or more
EXPERT = 12 * WIDTH * HIDDEN  # bytes
COPIED = 2**30  # bytes of weights that batched_mm copies for each pair, where it still takes part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512, 2048, 8192])
    parser.add_argument("--seconds", type=float, default=2.0, help="at least, per row")
    parser.add_argument("--processor", action="store_true", help="processor time")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    register()
    clock = time.process_time if options.processor else time.perf_counter
    torch.manual_seed(0)
    record: dict[str, Any] = {"machine": machine(), "clock": clock.__name__, "rows": []}
    for experts, choices in SIZES:
        modules = [block(experts) for _ in range(ceil(ROUND / (experts * EXPERT)))]
        for tokens in options.tokens:
            for mode in ("forward", "training"):
                times = measure(modules, tokens, choices, mode, options.seconds, clock)
                row = {"experts": experts, "choices": choices, "tokens": tokens, "mode": mode}
                record["rows"].append({**row, "s": times})
                print(cells(record["rows"][-1]), flush=True)
                save(options.out, record, page(record))


def block(experts: int) -> Any:
    """The experts of a Qwen3-MoE block, with weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=HIDDEN, num_experts=experts, num_hidden_layers=1
    )
    made = Qwen3MoeExperts(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    return made


def measure(
    modules: Sequence[Any],
    tokens: int,
    choices: int,
    mode: str,
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds of a call by each implementation, in turns after a warm-up."""
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    experts, pairs = modules[0].num_experts, tokens * choices
    calls = len(modules)  # in training gradients of all experts pass the cache besides
    if mode == "forward":
        calls = max(calls, ceil(ROUND / (min(experts, pairs) * EXPERT)))
    routed = [torch.rand(tokens, experts).topk(choices, -1) for _ in range(calls)]
    grad = torch.randn_like(x)
    names = [n for n in ("moezoo", *OTHERS) if n != "batched_mm" or pairs * EXPERT <= COPIED]

    def run(name: str) -> None:
        for number, (weights, chosen) in enumerate(routed):
            module = modules[number % len(modules)]
            module.config._experts_implementation = name
            if mode == "forward":
                with torch.no_grad():
                    module(x, chosen, weights)
                continue
            module(x, chosen, weights.requires_grad_()).backward(grad)
            module.zero_grad()
            x.grad = weights.grad = None

    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        run(name)
    begin = time.perf_counter()
    for number in range(200):
        for name in names:
            start = clock()
            run(name)
            times[name].append((clock() - start) / calls)
        if number >= 4 and time.perf_counter() - begin > seconds:
            break
    return times


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the page; the last cell is how many times the best other one takes longer."""
    times = row["s"]
    shown = [milliseconds(times[n]) if n in times else "" for n in ("moezoo", *OTHERS)]
    sizes = [str(row[key]) for key in ("experts", "choices", "tokens", "mode")]
    return [*sizes, *shown, f"{over_best(times):.2f}"]


def page(record: dict[str, Any]) -> list[str]:
    head = ["experts", "k", "tokens", "mode", "moezoo", *OTHERS, "best other / moezoo"]
    processor = record["clock"] == "process_time"
    return [
        "# Experts of transformers' sparse models",
        f"`python -m benchmarks.experts_interface`: {record['machine']}. A Qwen3-MoE block's "
        f"experts (D {WIDTH}, F {HIDDEN}) by `experts_implementation`; milliseconds of "
        f"{'processor time' if processor else 'wall time'}, median (minimum), in turns. "
        f"Training is forward and backward. Calls go round {ROUND >> 20} MiB of weights or more, "
        "which no cache holds, as in a model whose layers take turns. batched_mm copies the "
        "weights of every pair and sits out where these are more than a GiB.",
        table(head, [cells(row) for row in record["rows"]]),
    ]


if __name__ == "__main__":
    main()
