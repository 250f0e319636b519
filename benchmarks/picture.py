"""The picture of layer.json: what a layer costs with more experts, and with more tokens."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot as plt

COLOURS = {"moezoo": "#1b6e53", "transformers": "#b3541e", "dense": "#8a8a8a"}


def draw(record: dict[str, Any], path: Path) -> None:
    """Two rows, forward and training: time over experts at fixed tokens, and over tokens."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    rows = record["rows"]
    counts = sorted({row["experts"] for row in rows})
    tokens = sorted({row["tokens"] for row in rows})
    for line, mode in enumerate(("forward", "training")):
        for fixed, style in ((512, "--"), (8192, "-")):
            for side, colour in COLOURS.items():
                times = [milliseconds(rows, mode, side, experts, fixed) for experts in counts]
                axes[line][0].plot(counts, times, style, color=colour, marker="o")
        for experts, style in ((8, "-"), (128, "--")):
            for side, colour in COLOURS.items():
                times = [milliseconds(rows, mode, side, experts, count) for count in tokens]
                axes[line][1].plot(tokens, times, style, color=colour, marker="o")
        for axis, what, ticks in zip(
            axes[line], ("experts", "tokens"), (counts, tokens), strict=True
        ):
            axis.set(xscale="log", yscale="log", xlabel=what, ylabel=f"{mode}, ms")
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_title("Cost with experts: 8,192 tokens, dashed 512", fontsize=10)
    axes[0][1].set_title("Cost with tokens: 8 experts, dashed 128", fontsize=10)
    lines = axes[0][0].get_lines()[: len(COLOURS)]
    names = [*COLOURS][:-1] + ["a dense network of one expert's size"]
    figure.legend(lines, names, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def milliseconds(rows: list[Any], mode: str, side: str, experts: int, tokens: int) -> float:
    wanted = (mode, experts, tokens)
    (row,) = [r for r in rows if (r["mode"], r["experts"], r["tokens"]) == wanted]
    return median(row["s"][side]) * 1e3
