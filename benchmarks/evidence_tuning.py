"""How the trials of benchmarks/evidence.py are run: every side at its own best rate, over seeds.

A trial is first run at each rate that its task begins with on the first seed, and on beyond them
while the best is at an end; the best rate is then run on the other seeds. Finished trials are lines
of a file and are not run again: a run that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.reproductions import read
from moezoo.demonstration.closed_book import Moment

SEEDS = (0, 1, 2)
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A model and its training: from random weights (`scratch`, fields of its config; `widen`
    is a factor on their variance), or the parent going on, upcycled (`upcycle`) or as it is.
    """

    scratch: dict[str, Any] | None = None
    upcycle: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    steps: int = 800
    widen: float = 1.0


class Task(Protocol):
    """What a trial is trained on."""

    def key(self, trial: Trial, rate: float, seed: int) -> str:
        """What decides a trial's numbers, as one line of JSON."""

    def rates(self, trial: Trial) -> tuple[float, ...]:
        """The rates that a trial begins with."""

    def measure(self, trial: Trial, rate: float, seed: int) -> Row:
        """Train it; what was measured, with a `curve`."""

    def moments(self, row: Row) -> tuple[Moment, ...]:
        """A curve in which more is better."""


def run(task: Task, trial: Trial, out: Path) -> Iterator[Row]:
    """The trials that are not there yet: all rates on the first seed, the best on the others."""
    rates = list(task.rates(trial))
    while rates:
        for rate in rates:
            yield from _one(task, trial, rate, SEEDS[0], out)
        rates = beyond(task, trial, read(out))
    for seed in SEEDS[1:]:
        yield from _one(task, trial, best_rate(task, trial, read(out)), seed, out)


def _one(task: Task, trial: Trial, rate: float, seed: int, out: Path) -> Iterator[Row]:
    key = task.key(trial, rate, seed)
    if any(row["key"] == key for row in read(out)):
        return
    row = {"key": key, "rate": rate, "seed": seed, **task.measure(trial, rate, seed)}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    yield row


def tried(task: Task, trial: Trial, rows: list[Row]) -> dict[float, float]:
    """What a trial comes to by rate, on the first seed: more is better."""
    by_key = {row["key"]: row for row in rows}
    keys = {rate: task.key(trial, rate, SEEDS[0]) for rate in {row["rate"] for row in rows}}
    return {
        rate: task.moments(by_key[key])[-1].recall for rate, key in keys.items() if key in by_key
    }


def beyond(task: Task, trial: Trial, rows: list[Row]) -> list[float]:
    """The next rate, where the best of those tried is the least or the largest."""
    ends = tried(task, trial, rows)
    best = max(ends, key=ends.__getitem__)
    return [2 * best] * (best == max(ends)) + [best / 2] * (best == min(ends))


def best_rate(task: Task, trial: Trial, rows: list[Row]) -> float:
    """The rate with the best end on the first seed."""
    ends = tried(task, trial, rows) or {task.rates(trial)[0]: 0.0}
    return max(ends, key=ends.__getitem__)


def of_seeds(task: Task, trial: Trial, rows: list[Row]) -> dict[int, Row]:
    """A trial's rows at its best rate, by seed."""
    rate = best_rate(task, trial, rows)
    keys = {task.key(trial, rate, seed): seed for seed in SEEDS}
    return {keys[row["key"]]: row for row in rows if row["key"] in keys}
