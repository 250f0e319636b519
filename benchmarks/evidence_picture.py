"""The curves of a table of benchmarks/evidence.md: by steps, and by seconds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from moezoo.demonstration.closed_book import Moment

# Without the grey among them, which is for dense models.
HUES = [hue for index, hue in enumerate(colormaps["tab10"].colors) if index != 7]
GREYS = ("#111111", "#555555", "#888888", "#b0b0b0")
Curves = Mapping[str, list[tuple[Moment, ...]]]


def draw(curves: Curves, label: str, path: Path) -> Path:
    """A line a row of the table, the mean over its seeds, in a band from the least to the most.

    Args:
        curves: one for each seed, by the row's name; those of dense models are dashed.
        label: of what they show.
    """
    figure = Figure(figsize=(13, 4.8), dpi=110, layout="constrained")
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    shades, hues = count(), count()
    for name, seeds in curves.items():
        dense = "dense" in name
        color = GREYS[next(shades) % len(GREYS)] if dense else HUES[next(hues) % len(HUES)]
        style: dict[str, Any] = {"color": color, "linestyle": "--" if dense else "-"}
        columns = list(zip(*seeds, strict=True))
        values = [[moment.recall for moment in column] for column in columns]
        means = [mean(column) for column in values]
        for axes, across in ((by_steps, "step"), (by_seconds, "seconds")):
            places = [median(getattr(moment, across) for moment in column) for column in columns]
            axes.plot(places, means, label=name, **style)
            axes.fill_between(
                places, [*map(min, values)], [*map(max, values)], color=color, alpha=0.12, lw=0
            )
    by_steps.set(xlabel="steps", ylabel=label)
    by_seconds.set(xlabel="seconds of the processor")
    for axes in (by_steps, by_seconds):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    handles, names = by_steps.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path)
    return path
