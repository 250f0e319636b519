"""Tables and pictures of docs/reproductions.md, from the trials of benchmarks.reproductions.

    python -m benchmarks.reproductions_page [RESULTS]

Rewrites what stands between `<!-- name -->` and `<!-- /name -->` on the page, and draws
docs/images/reproductions-NAME.png (extra `report`). The words around the tables are written by
hand: after a run with other numbers, read them again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.reproductions import RESULTS, read
from benchmarks.reproductions_tables import (
    SECTIONS,
    Row,
    curve_of,
    differences,
    filled,
    trials_of,
)

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "reproductions.md"
INK, PALE = "#25303b", "#e8ebef"
SHADES = ["#7a8594", "#d1495b", "#edae49", "#00798c", "#30638e", "#8d6a9f", "#5b8c5a"]
CURVES = {
    "upcycling": (
        "dense goes on",
        "plain copy",
        "exact (the default)",
        "exact, virtual groups of 2",
    )
}
Trials = dict[str, list[Row]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = read(options.results)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    for name in SECTIONS:
        draw(name, trials_of(name, rows), DOCS / "images" / f"reproductions-{name}.png")


def draw(name: str, trials: Trials, path: Path) -> None:
    """Draw the panels of a section side by side as a PNG."""
    panels = SECTIONS[name].panels
    dots = any(panel not in ("by steps", "by seconds") for panel in panels)
    height = max(3.2, 0.28 * len(trials) + 1.2) if dots else 3.6
    figure = Figure(figsize=(10, height), dpi=110, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        PANELS[panel](axes, name, trials)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _curves(axes: Any, name: str, trials: Trials, column: int) -> None:
    """Mean over seeds by step or by seconds, and what lies between the seeds."""
    chosen = CURVES.get(name, tuple(trials))
    ends = []
    for label, color in zip(chosen, SHADES, strict=False):
        points = [list(zip(*curve_of(row), strict=True)) for row in trials[label]]
        x = [mean(values) for values in zip(*(p[column] for p in points), strict=True)]
        losses = list(zip(*(p[2] for p in points), strict=True))
        axes.plot(x, [mean(values) for values in losses], color=color, linewidth=1.8, label=label)
        low, high = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ends += [*low[1:], *high[1:]]
    if trials[chosen[0]][0]["before"] < max(ends) + 0.5:  # else the start would flatten the rest
        ends += [mean(row["before"] for row in trials[label]) for label in chosen]
    margin = 0.05 * (max(ends) - min(ends))
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_title("Held-out loss, nats per target token", loc="left", fontsize=10, color=INK)
    unit = ("training steps", "processor seconds")[column]
    axes.set_xlabel(f"{unit} (band: lowest to highest seed)", fontsize=8)


def _dots(axes: Any, values: dict[str, list[float]], title: str) -> None:
    """A row per trial, a dot per seed, a bar at the mean."""
    places = range(len(values), 0, -1)
    for place, found in zip(places, values.values(), strict=True):
        axes.scatter(found, [place] * len(found), s=22, color=SHADES[3], alpha=0.75, linewidth=0)
        axes.plot([mean(found)] * 2, [place - 0.3, place + 0.3], color=SHADES[1], linewidth=2)
    axes.set_yticks(list(places), labels=list(values))
    axes.set_ylim(0.4, len(values) + 0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("a dot per seed, a bar at the mean", fontsize=8)


def _difference(axes: Any, name: str, trials: Trials) -> None:
    reference = SECTIONS[name].reference
    base = trials[reference]
    values = {k: differences(v, base) for k, v in trials.items() if "from scratch" not in k}
    _dots(axes, values, f"Held-out loss minus that of {reference}")
    axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)


def _measured(field: str, title: str) -> Callable[[Any, str, Trials], None]:
    def panel(axes: Any, name: str, trials: Trials) -> None:
        _dots(axes, {label: [row[field] for row in v] for label, v in trials.items()}, title)

    return panel


PANELS: dict[str, Callable[[Any, str, Trials], None]] = {
    "by steps": lambda axes, name, trials: _curves(axes, name, trials, 0),
    "by seconds": lambda axes, name, trials: _curves(axes, name, trials, 1),
    "difference": _difference,
    "violation": _measured("max_violation", "MaxVio, mean of the last 50 steps"),
    "dropped": _measured("dropped", "Share of tokens dropped in training"),
}


if __name__ == "__main__":
    main()
