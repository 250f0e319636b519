"""A training run as curves, from its metrics.jsonl alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moezoo.errors import ConfigError, CorruptFile
from moezoo.reporting.layers import rounded

POINTS = 240  # of a curve; more steps than that are averaged
CURVES = ("loss", "dropped", "max_violation", "entropy", "dead")


def run_document(path: str | Path) -> dict[str, Any]:
    """The curves of a run directory, or of its metrics.jsonl.

    Raises ConfigError for a directory without one, CorruptFile naming the line that is none of a
    run's; a last line that was cut by a kill is left out.
    """
    file = Path(path)
    file = file / "metrics.jsonl" if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "Name the directory that `moezoo train` or `finetune` wrote."
        reason = "holds no metrics.jsonl"
        raise ConfigError(reason, path=path, field="run", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"cannot be read: {error}", path=file) from None
    lines = text.split("\n")
    rows = [_row(line, number, file) for number, line in enumerate(lines[:-1], 1) if line.strip()]
    return curves(rows, name=str(path))


def curves(rows: Sequence[dict[str, Any]], *, name: str) -> dict[str, Any]:
    """The curves of rows as metrics.jsonl has them."""
    steps = sorted((row for row in rows if "loss" in row), key=lambda row: int(row["step"]))
    measured = [row for row in rows if "held_out" in row]
    width = -(-len(steps) // POINTS) or 1
    parts = [steps[start : start + width] for start in range(0, len(steps), width)]
    layers = sorted({int(layer) for row in steps for layer in row.get("dead_by_layer") or {}})
    return {
        "name": name,
        "steps": int(steps[-1]["step"]) if steps else 0,
        "averaged": width,
        "step": [int(part[-1]["step"]) for part in parts],
        **{curve: [_mean(part, curve) for part in parts] for curve in CURVES},
        "held_out": [[int(row["step"]), row["held_out"]] for row in measured],
        "dead_by_layer": {
            str(layer): [_dead(part, str(layer)) for part in parts] for layer in layers
        },
        "warnings": [
            {"step": int(row["step"]), "text": str(text)}
            for row in rows
            for text in row.get("warnings") or ()
        ][-20:],
    }


def _row(line: str, number: int, file: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        int(row["step"])
        numbers = [row[name] for name in (*CURVES, "held_out") if row.get(name) is not None]
        if all(isinstance(value, int | float) for value in numbers):
            return dict(row)
    except (ValueError, KeyError, TypeError):
        pass
    raise CorruptFile(f"line {number} is none of a run's", path=file)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    found = [float(row[name]) for row in rows if row.get(name) is not None]
    return rounded(sum(found) / len(found)) if found else None


def _dead(rows: Sequence[dict[str, Any]], layer: str) -> float | None:
    found = [row["dead_by_layer"].get(layer, 0) for row in rows if "dead_by_layer" in row]
    return rounded(sum(found) / len(found)) if found else None
