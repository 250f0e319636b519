"""Forward and training step of switch-base-8 (random weights, float32) next to transformers.

    python -m benchmarks.model [--rounds 3] [--batch 4] [--source 256] [--target 114]

Each round runs one process per library, in turns, so that both see the same machine and each has
a peak memory of its own. A training step is forward, backward and AdamW, the optimiser with the
same settings for both (fused, as moezoo's recipes use it). Writes benchmarks/model.json and
model.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.peers import ours, peak_mib, theirs
from benchmarks.tables import machine, milliseconds, ratio, save, table

SIDES = ("moezoo", "transformers")
PARTS = ("forward", "forward + backward", "optimizer", "training step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="switch-base-8")
    sizes = {"rounds": 3, "steps": 3, "batch": 4, "source": 256, "target": 114}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--worker", choices=SIDES)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict[str, list[float]]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side, found in results.items():
            print(f"round {number + 1} of {options.rounds}: {side}", flush=True)
            command = [sys.executable, "-m", "benchmarks.model", *sys.argv[1:], "--worker", side]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(lines.splitlines()[-1]))
    chosen = {name: getattr(options, name) for name in ("model", *sizes)}
    record = {"machine": machine(), "options": chosen, "results": results}
    save(options.out, record, page(record))
    print(options.out.with_suffix(".md").read_text())


def page(record: dict[str, Any]) -> list[str]:
    """The sections of model.md."""
    results, sizes = record["results"], record["options"]
    rows = []
    for part in PARTS:
        times = [[t for r in results[side] for t in r[part]] for side in SIDES]
        tokens = 0 if part == "optimizer" else sizes["batch"] * (sizes["source"] + sizes["target"])
        rates = [f"{tokens / median(t):,.0f}" if tokens else "" for t in times]
        rows.append([part, *map(milliseconds, times), *rates, ratio(times[1], times[0])])
    memory = []
    for part in ("forward", "training"):
        peaks = [median(r[f"{part} MiB"][0] for r in results[side]) for side in SIDES]
        memory.append([part, *(f"{p:,.0f}" for p in peaks), f"{peaks[1] / peaks[0]:.2f}"])
    shape = "{model}, batch {batch} x {source} source and {target} target tokens".format(**sizes)
    intro = __doc__.split("\n\n")[-1].strip()
    head = ["what", *(f"{s}, ms" for s in SIDES), *(f"{s}, tokens/s" for s in SIDES)]
    return [
        "# Forward and training step of a model",
        f"`python -m benchmarks.model`, {record['machine']}. {intro}",
        f"{shape}. Times are median (min); the ratio of medians (of minima), above 1 where moezoo "
        "is faster.",
        table([*head, "transformers / moezoo"], rows),
        "Peak memory of the process, MiB.",
        table(["what", *SIDES, "transformers / moezoo"], memory),
    ]


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step of one library in this process, and its peak memory."""
    model = build(options)
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = torch.randint(2, vocabulary, (options.batch, options.source))
    labels = torch.randint(2, vocabulary, (options.batch, options.target))
    found: dict[str, list[float]] = {"forward": [], "forward + backward": [], "optimizer": []}
    with torch.no_grad():
        for _ in range(options.steps + 1):
            found["forward"].append(seconds(lambda: model(input_ids=ids, labels=labels)))
    found["forward MiB"] = [peak_mib()]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(options.steps + 1):
        found["forward + backward"].append(
            seconds(lambda: model(input_ids=ids, labels=labels).loss.backward())
        )
        found["optimizer"].append(seconds(optimizer.step))
        optimizer.zero_grad()
    for name in ("forward", "forward + backward", "optimizer"):
        del found[name][0]  # a warm-up
    pairs = zip(found["forward + backward"], found["optimizer"], strict=True)
    found["training step"] = [a + b for a, b in pairs]
    found["training MiB"] = [peak_mib()]
    return found


def build(options: argparse.Namespace) -> nn.Module:
    model = ours(options.model)
    return model if options.worker == "moezoo" else theirs(model)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
