"""The picture of a comparison: loss curves, and how busy each expert was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.errors import MissingExtra
from moezoo.reporting.trial import Curve, Trial

if TYPE_CHECKING:
    from moezoo.demonstration.closed_book import Learner

DENSE, SWITCH, PALE, INK = "#7a8594", "#d1495b", "#e8ebef", "#25303b"


def draw(
    learners: Sequence[Learner],
    sparse_learners: Sequence[Learner],
    history: Curve,
    dense: Trial,
    switch: Trial,
    *,
    path: Path,
) -> Path:
    """Draw both parts of the demo as a PNG: recall of facts above, text below.

    Args:
        learners, sparse_learners: the curves of both sides by seed.
        history: held-out loss by step of the dense model before both went on.

    Raises MissingExtra when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtra("a picture", "matplotlib", extra="report") from None
    figure = Figure(figsize=(11, 8.6), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2)
    sides = ((learners, "dense", DENSE), (sparse_learners, "switch", SWITCH))
    _recall(panels[0][0], sides, "step", "steps after upcycling")
    _recall(panels[0][1], sides, "seconds", "seconds of the processor")
    panels[0][0].set_title("Facts recalled, by steps", loc="left", fontsize=12, color=INK)
    panels[0][1].set_title("and by seconds", loc="left", fontsize=12, color=INK)
    _curves(panels[1][0], history, dense, switch)
    _loads(panels[1][1], switch)
    for axes in panels.flat:
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
    axes.set_xlim(0, furthest * 1.2)
    axes.set_ylim(0, 1)
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("share of facts", fontsize=9)


def _curves(axes: Any, history: Curve, dense: Trial, switch: Trial) -> None:
    start = history[-1][0] if history else 0
    axes.plot(*_columns(history), color=INK, linewidth=1.6)
    axes.axvline(start, color=PALE, linewidth=6, zorder=0)
    for trial, color in ((dense, DENSE), (switch, SWITCH)):
        shifted = [(start + step, loss) for step, loss in trial.held_out]
        axes.plot(*_columns(shifted), color=color, linewidth=2)
        trained = [(start + step, loss) for step, loss in _smooth(trial.training)]
        axes.plot(*_columns(trained), color=color, linewidth=0.8, alpha=0.45)
    ends = sorted(
        (trial.after, trial, color) for trial, color in ((dense, DENSE), (switch, SWITCH))
    )
    for (after, trial, color), place in zip(ends, ("top", "bottom"), strict=True):
        label = f" {trial.name} {after:.3f}"
        axes.text(start + trial.steps, after, label, color=color, va=place, fontsize=10)
    losses = [loss for _, loss in [*history, *dense.held_out, *switch.held_out]]
    margin = 0.06 * (max(losses) - min(losses))
    axes.set_ylim(min(losses) - margin, max(losses) + margin)
    axes.set_xlim(0, (start + dense.steps) * 1.2)
    axes.annotate(
        "upcycled here", (start, 1), xycoords=("data", "axes fraction"), xytext=(-6, -4),
        textcoords="offset points", ha="right", va="top", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_title("Loss on held-out text", loc="left", fontsize=12, color=INK)
    axes.set_xlabel("training steps (thin: training loss, smoothed)", fontsize=9)
    axes.set_ylabel("nats per target token", fontsize=9)


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
    axes.set_title("Tokens by expert, held-out", loc="left", fontsize=12, color=INK)
    axes.set_xlabel("expert (dashed: an equal share)", fontsize=9)
    axes.set_ylabel("% of the layer's tokens", fontsize=9)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]


def _smooth(curve: Curve, *, window: int = 40) -> Curve:
    """A running mean over at most `window` steps."""
    smoothed, total = [], 0.0
    for index, (step, loss) in enumerate(curve):
        total += loss - (curve[index - window][1] if index >= window else 0.0)
        smoothed.append((step, total / min(index + 1, window)))
    return smoothed[min(window, len(curve)) // 2 :]
