"""What a person sees of a run: a live line, a table every n steps, warnings with advice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from moezoo.training.loop import StepRecord, mean_of

_HEADER = ("step", "loss", "ce", "balance", "drop", "maxvio", "dead", "entropy", "norm", "tok/s")


class Watch:
    """Prints a row every `every` steps and, on a terminal, a live line in between.

    Warns when routing collapses or tokens are dropped en masse, once per cause until it has passed.

    Args:
        steps: of the run. every: steps per row. num_experts: of a sparse layer; 0: dense.
    """

    def __init__(
        self, *, steps: int, every: int = 50, num_experts: int = 0, stream: TextIO | None = None
    ) -> None:
        self.steps, self.every, self.num_experts = steps, max(every, 1), num_experts
        self.stream = sys.stderr if stream is None else stream
        self._recent: list[StepRecord] = []
        self._rows = 0
        self._warned: set[str] = set()

    def __call__(self, record: StepRecord) -> list[str]:
        """Show a step; returns the warnings that it caused."""
        self._recent.append(record)
        if record.step % self.every and record.step != self.steps:
            if self.stream.isatty():
                self._write(f"\r\x1b[Kstep {record.step}/{self.steps}  loss {record.loss:.3f}", "")
            return []
        if self.stream.isatty():
            self._write("\r\x1b[K", "")
        if self._rows % 20 == 0:
            self._write("".join(f"{name:>9}" for name in _HEADER))
        self._rows += 1
        self._write(row(self._recent))
        found = advice(self._recent, self.num_experts)
        new = [text for cause, text in found.items() if cause not in self._warned]
        self._warned = set(found)
        for text in new:
            self._write(f"  warning: {text}")
        self._recent = []
        return new

    def _write(self, text: str, end: str = "\n") -> None:
        self.stream.write(text + end)
        self.stream.flush()


def row(records: Sequence[StepRecord]) -> str:
    """The means over some steps as one row of the table."""
    last = records[-1]
    seconds = sum(record.seconds for record in records)
    speed = sum(record.tokens for record in records) / seconds if seconds else 0.0
    parts = {n: sum(r.losses.get(n, 0.0) for r in records) / len(records) for n in last.losses}
    cells = (
        f"{last.step}",
        f"{mean_of(records, 'loss'):.3f}",
        f"{parts.get('cross_entropy', 0.0):.3f}",
        f"{parts['load_balance']:.3f}" if "load_balance" in parts else "-",
        f"{mean_of(records, 'dropped'):.1%}",
        f"{mean_of(records, 'max_violation'):.2f}",
        f"{last.dead}",
        f"{mean_of(records, 'entropy'):.2f}",
        f"{mean_of(records, 'gradient_norm'):.2f}",
        f"{speed:,.0f}",
    )
    return "".join(f"{cell:>9}" for cell in cells)


def advice(records: Sequence[StepRecord], num_experts: int) -> dict[str, str]:
    """What looks wrong over some steps, by cause, each with what to do."""
    if not num_experts:
        return {}
    found = {}
    if mean_of(records, "dropped") > 0.2:
        found["drops"] = (
            f"{mean_of(records, 'dropped'):.0%} of tokens are dropped: raise the capacity factor "
            "or the load_balance coefficient"
        )
    worst = mean_of(records, "max_violation")
    if worst > 0.75 * (num_experts - 1) and num_experts > 2:
        found["collapse"] = (
            "routing collapses: one expert takes nearly everything in some layer; raise the "
            "load_balance coefficient, lower the learning rate, or start from another router_init"
        )
    if any(record.skipped for record in records):
        found["skipped"] = "steps were skipped for gradients that are not finite: lower the rate"
    return found
