"""The page of benchmarks/gpu.py."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.tables import milliseconds, ratio, table


def page(record: dict[str, Any], about: str) -> list[str]:
    """The sections of gpu.md; about: the docstring of the script, whose last paragraph opens it."""
    intro = about.strip().split("\n\n")[-1]
    sections = ["# On a GPU", f"`python -m benchmarks.gpu`, {record['machine']}. {intro}"]
    sections.append(
        "Times are median (min) in ms; ratios of medians (of minima). Above 1 in a column "
        '"transformers / moezoo", moezoo is faster. TFLOP/s count the products of experts alone.'
    )
    parts = {
        "ceilings": _ceilings,
        "layers": _layers,
        "backends": _backends,
        "model": _model,
        "decode": _decode,
    }
    for name, made in parts.items():
        if name in record:
            sections += made(record[name])
    return sections


def _ceilings(found: dict[str, float]) -> list[str]:
    return [
        f"This card multiplies 8,192 x 8,192 matrices of bfloat16 at {found['tflops']:.0f} TFLOP/s "
        f"and copies {found['tb_per_s']:.1f} TB/s, bytes read and written."
    ]


def _rate(row: dict[str, Any], name: str) -> str:
    return f"{row['flops'] / median(row['s'][name]) / 1e12:.0f}"


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    head = ["experts", "tokens", "moezoo ms", "transformers ms", "transformers / moezoo"]
    head += ["moezoo TFLOP/s", "moezoo / dense"]
    sections = []
    for mode in ("forward", "training"):
        more = ["graph", "dense graph"] if mode == "forward" else ["grouped", "triton"]
        names = {"graph": "graph ms", "dense graph": "graph / dense graph"}
        cells = []
        for row in (row for row in rows if row["mode"] == mode):
            s = row["s"]
            line = [str(row["experts"]), f"{row['tokens']:,}"]
            line += [milliseconds(s["moezoo"]), milliseconds(s["transformers"])]
            line += [ratio(s["transformers"], s["moezoo"]), _rate(row, "moezoo")]
            line += [ratio(s["moezoo"], s["dense"]), milliseconds(s[more[0]])]
            line += (
                [ratio(s["graph"], s["dense graph"])]
                if mode == "forward"
                else [milliseconds(s["triton"])]
            )
            line += [f"{row['mib'][side]:,.0f}" for side in ("moezoo", "transformers")]
            cells.append(line)
        titles = [*head, *(names.get(name, f"{name} ms") for name in more)]
        titles += ["MiB", "MiB, transformers"]
        title = "Forward" if mode == "forward" else "Forward + backward"
        sections += [f"## {title}", table(titles, cells)]
    return sections


def _backends(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["s"])
    cells = [
        [
            r["dtype"],
            str(r["experts"]),
            f"{r['tokens']:,}",
            *(milliseconds(r["s"][n]) for n in names),
        ]
        for r in rows
    ]
    words = (
        "The forward pass of a layer through one backend for all of its products, ms: the table "
    )
    words += 'in `moezoo/ops/backends.py` follows from this. "tf32" is float32 whose products may '
    words += "be rounded (`torch.set_float32_matmul_precision`)."
    return ["## Backends", words, table(["dtype", "experts", "tokens", *names], cells)]


def _model(found: dict[str, Any]) -> list[str]:
    rows = []
    for name in ("forward", "training step"):
        ours, peer = found[name]["moezoo"], found[name]["transformers"]
        rows.append([name, milliseconds(ours), milliseconds(peer), ratio(peer, ours)])
    memory = found["MiB"]
    more = f"{memory['transformers'] / memory['moezoo']:.2f}"
    rows.append(["MiB that a step adds", *(f"{m:,.0f}" for m in memory.values()), more])
    head = ["what", "moezoo", "transformers", "transformers / moezoo"]
    return ["## switch-base-8, 8 x 512 source and 114 target tokens", table(head, rows)]


def _decode(rows: list[dict[str, Any]]) -> list[str]:
    head = ["batch", "beams", "moezoo ms", "transformers ms", "transformers / moezoo"]
    head += ["moezoo, ms per token", "equal tokens"]
    cells = []
    for row in rows:
        ours, peer = row["s"]["moezoo"], row["s"]["transformers"]
        line = [str(row["batch"]), str(row["beams"]), milliseconds(ours), milliseconds(peer)]
        line += [ratio(peer, ours), f"{median(ours) / row['tokens'] * 1e3:.1f}"]
        cells.append([*line, f"{row['same']:.0%}"])
    return ["## 64 new tokens, sources of 64", table(head, cells)]
