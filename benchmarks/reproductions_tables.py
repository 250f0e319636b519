"""The tables of docs/reproductions.md: what was measured, mean and spread over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import moezoo
from benchmarks.reproductions import SIZES, TABLES, Trial, key_of
from benchmarks.tables import table

Row = dict[str, Any]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Section:
    """What a table shows. reference: the trial that others are compared with, seed by seed.
    columns: of `COLUMNS`. panels: of the picture; see reproductions_page.
    """

    reference: str
    columns: tuple[str, ...]
    panels: tuple[str, ...]


SECTIONS = {
    "experts": Section(
        "dense",
        ("parameters", "after", "difference", "at equal seconds", "seconds", "violation", "dead"),
        ("by steps", "by seconds"),
    ),
    "experts-0.1x": Section(
        "dense",
        ("after", "difference", "at equal seconds", "seconds", "violation", "dead"),
        ("by steps", "by seconds"),
    ),
    "upcycling": Section(
        "dense goes on",
        ("parameters", "before", "after", "difference", "at equal seconds", "seconds", "dead"),
        ("by steps", "difference"),
    ),
    "initialisation": Section(
        "0.1x", ("before", "after", "difference", "violation"), ("by steps", "difference")
    ),
    "precision": Section(
        "float32", ("after", "difference", "seconds", "violation"), ("by steps", "difference")
    ),
    "capacity": Section(
        "dropless", ("dropped", "after", "difference", "seconds"), ("dropped", "difference")
    ),
    "balance": Section(
        "load_balance 0.01",
        ("first violation", "violation", "dead", "after", "difference"),
        ("violation", "difference"),
    ),
}


def filled(page: str, rows: Sequence[Row]) -> str:
    """The page with every table as the rows have it. Raises ValueError naming missing markers."""
    for name in SECTIONS:
        body = f"<!-- {name} -->\n{rendered(name, rows)}\n<!-- /{name} -->"
        pattern = f"<!-- {name} -->.*<!-- /{name} -->"
        page, found = re.subn(pattern, lambda _, body=body: body, page, flags=re.DOTALL)
        if not found:
            raise ValueError(f"the page has no <!-- {name} --> ... <!-- /{name} -->")
    return page


def trials_of(name: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each trial of a table, in the order of its seeds.

    Raises ValueError for a trial that lacks a seed that another trial has.
    """
    by_key = {row["key"]: row for row in rows}
    facts = [json.loads(row["key"]) for row in rows]
    seeds = sorted({fact["seed"] for fact in facts})
    before, steps = max(f["before"] for f in facts), max(f["steps"] for f in facts)
    found: dict[str, list[Row]] = {}
    for label, trial in TABLES[name].items():
        keys = [key_of(trial, seed, before, steps) for seed in seeds]
        missing = [seed for seed, key in zip(seeds, keys, strict=True) if key not in by_key]
        if missing:
            raise ValueError(f"{name}, {label!r}: no result for seeds {missing}")
        found[label] = [by_key[key] for key in keys]
    return found


def rendered(name: str, rows: Sequence[Row]) -> str:
    """A table of the page, in Markdown."""
    section, trials = SECTIONS[name], trials_of(name, rows)
    reference = trials[section.reference]
    lines = []
    for label, found in trials.items():
        cells = [COLUMNS[c][1](found, reference, TABLES[name][label]) for c in section.columns]
        lines.append([label, *cells])
    head = [COLUMNS[c][0].format(reference=section.reference) for c in section.columns]
    picture = f"![{name}](images/reproductions-{name}.png)"
    return f"{table(['trial', *head], lines)}\n\n{picture}"


def loss_at(row: Row, seconds: float) -> float:
    """Held-out loss after so many seconds of training, between the two measurements around it."""
    points = curve_of(row)
    for (_, left, high), (_, right, low) in zip(points, points[1:], strict=False):
        if seconds <= right:
            return float(high + (low - high) * (seconds - left) / (right - left))
    return float(points[-1][2])


def curve_of(row: Row) -> list[Point]:
    """(step, seconds, held-out loss), the start included."""
    return [(0, 0.0, row["before"]), *(tuple(point) for point in row["curve"])]


def differences(found: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    """Held-out loss after all steps against the reference's, seed by seed."""
    return [a["after"] - b["after"] for a, b in zip(found, reference, strict=True)]


def at_equal_seconds(found: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    """Held-out loss against the reference's last, after as many seconds as the shorter run took."""
    pairs = []
    for row, other in zip(found, reference, strict=True):
        seconds = min(row["curve"][-1][1], other["curve"][-1][1])
        pairs.append(loss_at(row, seconds) - loss_at(other, seconds))
    return pairs


def parameters(trial: Trial) -> tuple[int, int]:
    """All parameters of a trial's model, and those that a token's forward pass uses."""
    if trial.upcycle is None:
        fields = trial.scratch or {}
        model = moezoo.build(moezoo.SwitchConfig(**{**SIZES, **fields}), device="meta")
    else:
        dense = moezoo.build(moezoo.SwitchConfig(**SIZES))
        model = moezoo.upcycle(dense, **{**trial.upcycle, "router_init": "normal"})
    config: Any = model.config
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if not experts:
        return total, total
    spec = config.router if isinstance(config.router, dict) else {}
    return total, total - experts + experts * int(spec.get("k", 1)) // config.num_experts


def spread(values: Sequence[float], *, digits: int = 3, sign: bool = False) -> str:
    """Mean (lowest to highest)."""
    shown = [f"{v:{'+' if sign else ''}.{digits}f}" for v in (mean(values), *_ends(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _mean_of(name: str, form: str) -> Callable[..., str]:
    return lambda found, reference, trial: form.format(mean(row[name] for row in found))


def _spread_of(name: str, digits: int) -> Callable[..., str]:
    return lambda found, reference, trial: spread([r[name] for r in found], digits=digits)


def _against(measure: Callable[..., list[float]]) -> Callable[..., str]:
    def cell(found: list[Row], reference: list[Row], trial: Trial) -> str:
        return "" if found is reference else spread(measure(found, reference), sign=True)

    return cell


def _parameters(found: list[Row], reference: list[Row], trial: Trial) -> str:
    total, active = parameters(trial)
    return f"{total / 1e3:.0f} / {active / 1e3:.0f}"


def _seconds(found: list[Row], reference: list[Row], trial: Trial) -> str:
    return f"{mean(row['curve'][-1][1] for row in found):.0f}"


COLUMNS: dict[str, tuple[str, Callable[..., str]]] = {
    "parameters": ("parameters, thousands: all / active", _parameters),
    "before": ("loss before", _mean_of("before", "{:.3f}")),
    "after": ("loss after", _spread_of("after", 3)),
    "difference": ("minus that of {reference}", _against(differences)),
    "at equal seconds": ("the same at equal seconds", _against(at_equal_seconds)),
    "seconds": ("processor seconds", _seconds),
    "dropped": ("dropped", _mean_of("dropped", "{:.1%}")),
    "first violation": ("MaxVio, first 20 steps", _mean_of("first_violation", "{:.2f}")),
    "violation": ("MaxVio, last 50 steps", _spread_of("max_violation", 2)),
    "dead": ("experts without a token, of both layers", _mean_of("dead", "{:.1f}")),
}
