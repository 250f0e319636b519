"""A report for a terminal: a line a layer, then what stands out, a run and another model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moezoo.reporting.advice import dropped_at

HEADER = ("layer", "tokens", "dropped", "at 1.25", "MaxVio", "entropy", "confidence", "dead",
          "load")  # fmt: skip
_BARS = "▁▂▃▄▅▆▇█"
_NARROW = 32  # experts that a terminal line shows


def rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a layer; entropy as a share of log E, loads as bars (half height: the mean); "at
    1.25" is what that capacity factor would have dropped.
    """
    return [
        (
            layer["name"],
            f"{layer['tokens']:,}",
            _share(layer["dropped"]),
            _share(dropped_at(layer, 1.25)),
            _number(layer["max_violation"]),
            _share(_relative(layer["entropy"], layer["experts"]), 0),
            _number(layer["mean_confidence"]),
            str(len(layer["dead"])),
            sparkline(layer["load"][:_NARROW]) + ("..." if layer["experts"] > _NARROW else ""),
        )
        for layer in document["layers"]
    ]


def facts(document: dict[str, Any]) -> list[str]:
    """What does not fit the table, one line each."""
    said = list(document["notes"])
    if document["dense"]:
        said.append("A dense model: every MLP is one expert that takes every token.")
    run, pair = document["run"], document["pair"]
    if run is not None and run["steps"]:
        last = next((value for value in reversed(run["loss"]) if value is not None), None)
        said.append(f"run {run['name']}: {run['steps']:,} steps, loss {_number(last)} at the end")
    if pair is not None:
        said.append(f"against {pair['name']}: outputs apart by {pair['error']:g} of their length")
        for layer in pair["layers"]:
            if layer["agreement"] is not None:
                said.append(f"  {layer['layer']}: {layer['agreement']:.1%} of tokens routed alike")
    return said


def sparkline(counts: Sequence[int]) -> str:
    """Loads as one bar each; the mean is half height, twice the mean and more is full."""
    mean = sum(counts) / max(len(counts), 1)
    if not mean:
        return ""
    heights = (min(count / mean / 2, 1.0) for count in counts)
    return "".join(_BARS[round(height * (len(_BARS) - 1))] for height in heights)


def _relative(entropy: float | None, experts: int) -> float | None:
    return None if entropy is None or experts < 2 else entropy / math.log(experts)


def _share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
