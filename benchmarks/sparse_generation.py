"""Generation by a sparse model of transformers, with each implementation of its experts, and ours.

    python -m benchmarks.sparse_generation [--rows 1 8]

A Qwen3-MoE of 6 layers (width 512, 64 experts of 384, 8 of them a token) with random weights takes
prompts of 16 tokens and generates 24 more, greedily; all implementations in turns on the same
weights. Writes benchmarks/sparse_generation.json and sparse_generation.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import machine, milliseconds, over_best, samples, save, table
from moezoo.adapters.hf import register

OTHERS = ("eager", "grouped_mm", "batched_mm")
PROMPT, NEW, DTYPES = 16, 24, ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="at least, per row")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    options = parser.parse_args()
    register()
    record: dict[str, Any] = {"machine": machine(), "rows": []}
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = sparse_model().to(getattr(torch, dtype))
        for rows in options.rows:
            times = measure(model, rows, options.seconds)
            record["rows"].append({"dtype": dtype, "rows": rows, "s": times})
            print(cells(record["rows"][-1]), flush=True)
            save(options.out, record, page(record))


def sparse_model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config).eval()


def measure(model: Any, rows: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each implementation; batched_mm, which copies weights, for one text alone."""
    ids = torch.randint(0, 1000, (rows, PROMPT))

    def run(name: str) -> None:
        model.set_experts_implementation(name)
        model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    names = [n for n in ("moezoo", *OTHERS) if n != "batched_mm" or rows == 1]
    return samples({n: lambda n=n: run(n) for n in names}, seconds=seconds)  # type: ignore[misc]


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the page; the last cell is how many times the best other one takes longer."""
    times = row["s"]
    shown = [milliseconds(times[n]) if n in times else "" for n in ("moezoo", *OTHERS)]
    return [row["dtype"], str(row["rows"]), *shown, f"{over_best(times):.2f}"]


def page(record: dict[str, Any]) -> list[str]:
    head = ["dtype", "texts", "moezoo", *OTHERS, "best other / moezoo"]
    return [
        "# Generation by a sparse model of transformers",
        f"`python -m benchmarks.sparse_generation`: {record['machine']}. A Qwen3-MoE of 6 layers "
        f"(width 512, 64 experts of 384, 8 of them a token), prompts of {PROMPT} tokens and {NEW} "
        "more; milliseconds, median (minimum), in turns.",
        table(head, [cells(row) for row in record["rows"]]),
    ]


if __name__ == "__main__":
    main()
