"""Decoding of switch-base-8 (random weights, float32) next to transformers, on shared weights.

    python -m benchmarks.decode [--tokens 32] [--repeats 7]

Greedy search at several batches and source lengths, and beam search with 4 beams; both libraries
in turns in one process, and the tokens of both are compared. Writes benchmarks/decode.json and
decode.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.peers import interleaved, ours, theirs
from benchmarks.tables import machine, milliseconds, ratio, save, table

CASES = [(1, 32, 1), (1, 512, 1), (4, 256, 1), (8, 32, 1), (8, 512, 1), (1, 32, 4), (4, 256, 4)]
SIDES = ("moezoo", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="switch-base-8")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    model = ours(options.model).eval()
    peer = theirs(model)
    rows = []
    for batch, length, beams in CASES:
        rows.append(measure(model, peer, batch, length, beams, options))
        print(" | ".join(cells(rows[-1])), flush=True)
    record = {"machine": machine(), "tokens": options.tokens, "rows": rows}
    save(options.out, record, page(record))


def measure(
    model: nn.Module,
    peer: nn.Module,
    batch: int,
    length: int,
    beams: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Seconds per step of both, and whether they found the same tokens."""
    ids = torch.randint(2, 32000, (batch, length))
    sizes = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    generate: dict[str, Any] = {"moezoo": model.generate, "transformers": peer.generate}
    runs = {
        "moezoo": lambda: generate["moezoo"](ids, num_beams=beams, **sizes),
        "transformers": lambda: generate["transformers"](
            input_ids=ids, do_sample=False, num_beams=beams, **sizes
        ),
    }
    equal = torch.equal(runs["moezoo"](), runs["transformers"]())
    times = interleaved(runs, repeats=options.repeats)
    steps = {side: [t / options.tokens for t in times[side]] for side in SIDES}
    return {"batch": batch, "source": length, "beams": beams, "equal": equal, "s": steps}


def cells(row: dict[str, Any]) -> list[str]:
    times = [row["s"][side] for side in SIDES]
    search = "greedy" if row["beams"] == 1 else f"{row['beams']} beams"
    rates = [f"{row['batch'] / median(t):,.1f}" for t in times]
    equal = "equal" if row["equal"] else "DIFFERENT"
    what = [search, str(row["batch"]), str(row["source"])]
    return [*what, *map(milliseconds, times), *rates, ratio(times[1], times[0]), equal]


def page(record: dict[str, Any]) -> list[str]:
    """The sections of decode.md."""
    head = ["search", "batch", "source", *(f"{side}, ms per step" for side in SIDES)]
    head += [*(f"{side}, tokens/s" for side in SIDES), "transformers / moezoo", "tokens"]
    intro = __doc__.split("\n\n")[-1].strip()
    return [
        "# Decoding",
        f"`python -m benchmarks.decode`, {record['machine']}. {intro}",
        f"{record['tokens']} tokens a source, the encoder included. Times are median (min); ratios "
        "of medians (of minima), above 1 where moezoo is faster.",
        table(head, [cells(row) for row in record["rows"]]),
        "The floor of a step at batch 1 is to read the weights that one token uses, 495 MB: 22 to "
        "25 ms at 20 to 22 GB/s, 18 at 28. int8 weights lower it: [int8](int8.md).",
    ]


if __name__ == "__main__":
    main()
