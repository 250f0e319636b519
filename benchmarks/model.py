"""Forward and training step of switch-base-8 (random weights, float32) next to transformers.

    python benchmarks/model.py [--rounds 3] [--batch 4] [--source 256] [--target 114]

Each round runs one process per library, in turns, so that both see the same machine and each has
a peak memory of its own. A training step is forward, backward and AdamW with the same settings
(moezoo: the fused kernel, as its recipes use it; transformers: the default of its Trainer).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

import torch
from peers import ours, peak_mib, report, theirs
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="switch-base-8")
    for name, value in (
        ("rounds", 3),
        ("steps", 3),
        ("batch", 4),
        ("source", 256),
        ("target", 114),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--worker", choices=["moezoo", "transformers"])
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict[str, list[float]]]] = {"moezoo": [], "transformers": []}
    for _ in range(options.rounds):
        for side, found in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", side]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.append(json.loads(lines.splitlines()[-1]))
    print("| what | unit | moezoo: median (min) | transformers: median (min) | ratio |")
    print("|---|---|---|---|---|")
    for what in ("forward", "forward + backward", "optimizer", "training step"):
        times = {side: [t for r in found for t in r[what]] for side, found in results.items()}
        report(f"{what}, {options.batch} x {options.source} + {options.target}", times, 1e-3, "ms")
    for what in ("forward MiB", "training MiB"):
        peaks = {side: [median(r[what][0] for r in found)] for side, found in results.items()}
        report(f"peak memory, {what.split()[0]}", peaks, 1.0, "MiB")


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step of one library in this process, and its peak memory."""
    model = build(options)
    ids = torch.randint(2, model.config.vocab_size, (options.batch, options.source))
    labels = torch.randint(2, model.config.vocab_size, (options.batch, options.target))
    found: dict[str, list[float]] = {"forward": [], "forward + backward": [], "optimizer": []}
    with torch.no_grad():
        for _ in range(options.steps + 1):
            found["forward"].append(seconds(lambda: model(input_ids=ids, labels=labels)))
    found["forward MiB"] = [peak_mib()]
    model.train()
    fused = options.worker == "moezoo"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if fused else None)
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


def seconds(run: object) -> float:
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
