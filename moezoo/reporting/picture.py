"""The picture of a comparison: what experts bring, what they cost, and how busy each was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.errors import MissingExtra
from moezoo.reporting.trial import Curve, Price, Trial

if TYPE_CHECKING:
    from moezoo.demonstration.closed_book import Learner

DENSE, SWITCH, INK = "#7a8594", "#d1495b", "#25303b"


def draw(
    learners: Sequence[Learner],
    sparse_learners: Sequence[Learner],
    price: Price,
    dense: Trial,
    switch: Trial,
    *,
    path: Path,
) -> Path:
    """Draw both parts of the demo as a PNG: recall of facts above, what the experts cost below it,
    then text.

    Args:
        learners, sparse_learners: the curves of both sides by seed. price: of the latter, in
            multiples of the former.

    Raises MissingExtra when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError:
        raise MissingExtra("a picture", "matplotlib", extra="report") from None
    engine = ConstrainedLayoutEngine(h_pad=0.12)
    figure = Figure(figsize=(11, 11.6), dpi=150, layout=engine)
    panels = figure.subplot_mosaic(
        [["steps", "seconds"], ["price", "price"], ["text", "loads"]], height_ratios=(4, 2.6, 3.6)
    )
    sides = ((learners, "dense", DENSE), (sparse_learners, "switch", SWITCH))
    _recall(panels["steps"], sides, "step", "steps after upcycling")
    _recall(panels["seconds"], sides, "seconds", "processor seconds after upcycling")
    _price(panels["price"], {"facts": price, "text": switch.price / dense.price})
    _curves(panels["text"], dense, switch)
    _loads(panels["loads"], switch)
    titles = {
        "steps": "What experts bring: facts recalled, by steps",
        "seconds": "and by processor seconds",
        "price": "What they cost: the Switch model in multiples of the dense one (dashed)",
        "text": "Loss on held-out text after upcycling",
        "loads": "Tokens by expert, held-out text",
    }
    for name, axes in panels.items():
        axes.set_title(titles[name], loc="left", fontsize=12, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    figure.savefig(path)
    return path


def _recall(
    axes: Any, sides: Sequence[tuple[Sequence[Learner], str, str]], across: str, label: str
) -> None:
    """A thin line a seed, a thick one for their mean; dashed: where the dense model ended."""
    furthest = 0.0
    for side, name, color in sides:
        moments = list(zip(*(one.curve for one in side), strict=True))
        for one in side:
            axes.plot([getattr(m, across) for m in one.curve], [m.recall for m in one.curve],
                      color=color, linewidth=0.7, alpha=0.5)  # fmt: skip
        place = [sum(getattr(m, across) for m in column) / len(column) for column in moments]
        height = [sum(m.recall for m in column) / len(column) for column in moments]
        axes.plot(place, height, color=color, linewidth=2.2)
        axes.text(place[-1], height[-1], f" {name} {height[-1]:.2f}", color=color, fontsize=10,
                  va="bottom" if name == "dense" else "center")  # fmt: skip
        furthest = max(furthest, place[-1])
    goal = sum(one.recall for one in sides[0][0]) / len(sides[0][0])
    axes.plot(
        [0, place[-1]], [goal, goal], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0
    )
    axes.set_xlim(0, furthest * 1.25)
    axes.set_ylim(0, 1)
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("share of facts", fontsize=9)


def _price(axes: Any, parts: Mapping[str, Price]) -> None:
    """A bar a quantity and part of the demo; in the order of reading, from the top."""
    shown = {"parameters in memory": "parameters", "processor time of a step": "seconds",
             "parameters that a token uses": "active"}  # fmt: skip
    shades, height, furthest = (SWITCH, "#e9a3ac"), 0.8 / len(parts), 1.0
    for row, field in enumerate(shown.values()):
        for index, (part, price) in enumerate(parts.items()):
            place, value = row - 0.4 + height * (index + 0.5), getattr(price, field)
            axes.barh(place, value, height * 0.9, color=shades[index % len(shades)])
            axes.text(value, place, f" {value:.2f} ({part})", va="center", fontsize=9, color=INK)
            furthest = max(furthest, value)
    axes.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * furthest)


def _curves(axes: Any, dense: Trial, switch: Trial) -> None:
    for trial, color in ((dense, DENSE), (switch, SWITCH)):
        axes.plot(*_columns(trial.held_out), color=color, linewidth=2, marker="o", markersize=3)
    ends = sorted(
        (trial.after, trial, color) for trial, color in ((dense, DENSE), (switch, SWITCH))
    )
    for (after, trial, color), place in zip(ends, ("top", "bottom"), strict=True):
        label = f" {trial.name} {after:.3f}"
        axes.text(trial.steps, after, label, color=color, va=place, fontsize=10)
    axes.set_xlim(0, dense.steps * 1.25)
    axes.set_xlabel("steps after upcycling", fontsize=9)
    axes.set_ylabel("nats per target token (axis does not begin at 0)", fontsize=9)


def _loads(axes: Any, switch: Trial) -> None:
    layers, experts = list(switch.loads), len(next(iter(switch.loads.values()), []))
    width = 0.8 / max(len(layers), 1)
    shades = [SWITCH, "#edae49", "#00798c", "#30638e", "#8d6a9f", "#5b8c5a"]
    for index, layer in enumerate(layers):
        places = [expert - 0.4 + width * (index + 0.5) for expert in range(experts)]
        heights = [100 * share for share in switch.loads[layer]]
        axes.bar(places, heights, width * 0.92, color=shades[index % len(shades)], label=layer)
    if experts:
        axes.axhline(100 / experts, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xticks(range(experts))
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        tallest = max(share for layer in layers for share in switch.loads[layer])
        axes.set_ylim(0, max(130 * tallest, 125 / experts))
    axes.set_xlabel("expert (dashed: an equal share)", fontsize=9)
    axes.set_ylabel("% of the layer's tokens", fontsize=9)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]
