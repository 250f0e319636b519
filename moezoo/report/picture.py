"""The picture of a comparison: loss curves, and how busy each expert was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.errors import ConfigError
from moezoo.report.trial import Curve, Trial

DENSE, SWITCH, PALE, INK = "#7a8594", "#d1495b", "#e8ebef", "#25303b"


def draw(history: Curve, dense: Trial, switch: Trial, path: Path) -> Path:
    """Draw both models as a PNG.

    Args:
        history: held-out loss by step of the dense model before both went on.

    Raises ConfigError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        hint = "Install it with `pip install 'moezoo[report]'`."
        raise ConfigError("pictures need matplotlib", hint=hint) from None
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _curves(curves, history, dense, switch)
    _loads(bars, switch)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    figure.savefig(path)
    return path


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
    later = [loss for _, loss in [*history, *dense.held_out, *switch.held_out]]
    low, high = min(later), sorted(later)[int(0.9 * (len(later) - 1))]
    axes.set_ylim(low - 0.12 * (high - low), high + 0.25 * (high - low))
    axes.set_xlim(0, (start + dense.steps) * 1.16)
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
