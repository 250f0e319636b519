"""What a person sees of a run: a live line, a table every n steps, warnings with advice."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TextIO

from moezoo.progress import bar, show
from moezoo.training.loop import StepRecord, mean_of

_HEADER = "step loss ce balance z drop maxvio dead entropy norm tok/s".split()
_SPIKE = 3.0
_IDLE_STEPS = 10


class Watch:
    """Prints a row every `every` steps and, on a terminal, a live line in between.

    Warns when routing collapses, experts stay idle, tokens are dropped en masse, the loss jumps or
    steps are skipped: once per cause until it has passed.

    Args:
        steps: of the run. every: steps per row. num_experts: of a sparse layer; 0: dense.
        memory: what `memory` gave where the run stopped, if it goes on.
    """

    def __init__(
        self,
        *,
        steps: int,
        every: int = 50,
        num_experts: int = 0,
        stream: TextIO | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self.steps, self.every, self.num_experts = steps, max(every, 1), num_experts
        self.stream = sys.stderr if stream is None else stream
        memory = memory or {}
        self._recent = [StepRecord(**values) for values in memory.get("recent", ())]
        self._before: float | None = memory.get("before")
        self._rows = 0
        self._warned: set[str] = set(memory.get("warned", ()))

    def memory(self) -> dict[str, Any]:
        """What the next row and its warnings hang on, as plain values."""
        # Thousands of idle experts in a large model; those of all steps are all that is asked for.
        idle = tuple(sorted(_idle(self._recent)))
        recent = [vars(replace(record, idle=idle)) for record in self._recent]
        return {"recent": recent, "before": self._before, "warned": sorted(self._warned)}

    def __call__(self, record: StepRecord) -> list[str]:
        """Show a step; returns the warnings that it caused."""
        self._recent.append(record)
        if record.step % self.every and record.step != self.steps:
            if self.stream.isatty():
                show(self.stream, live(self._recent, self.steps))
            return []
        if self.stream.isatty():
            show(self.stream, "")
        if self._rows % 20 == 0:
            self._write("".join(f"{name:>9}" for name in _HEADER))
        self._rows += 1
        self._write(row(self._recent))
        found = advice(self._recent, self.num_experts, before=self._before)
        self._before = mean_of(self._recent, "loss")
        new = [text for cause, text in found.items() if cause not in self._warned]
        self._warned = set(found)
        for text in new:
            self._write(f"  warning: {text}")
        self._recent = []
        return new

    def _write(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


def live(records: Sequence[StepRecord], steps: int) -> str:
    """The newest step and the time that is left, as one line."""
    last = records[-1]
    seconds = last.step * mean_of(records, "seconds")
    note = f"loss {last.loss:.3f}  drop {last.dropped:.1%}  {last.tokens_per_second:,.0f} tok/s"
    return bar("train", last.step, steps, seconds, note=note)


def row(records: Sequence[StepRecord]) -> str:
    """The means over some steps as one row of the table."""
    last = records[-1]
    seconds = sum(record.seconds for record in records)
    speed = sum(record.tokens for record in records) / seconds if seconds else 0.0
    entropy = mean_of(records, "entropy")
    parts = {n: sum(r.losses.get(n, 0.0) for r in records) / len(records) for n in last.losses}
    cells = (
        f"{last.step}",
        f"{mean_of(records, 'loss'):.3f}",
        f"{parts.get('cross_entropy', 0.0):.3f}",
        f"{parts['load_balance']:.3f}" if "load_balance" in parts else "-",
        f"{parts['z']:.2f}" if "z" in parts else "-",
        f"{mean_of(records, 'dropped'):.1%}",
        f"{mean_of(records, 'max_violation'):.2f}",
        f"{last.dead}",
        "-" if math.isnan(entropy) else f"{entropy:.2f}",
        f"{mean_of(records, 'gradient_norm'):.2f}",
        f"{speed:,.0f}",
    )
    return "".join(f"{cell:>9}" for cell in cells)


def advice(
    records: Sequence[StepRecord], num_experts: int, *, before: float | None = None
) -> dict[str, str]:
    """What looks wrong over some steps, by cause, each with what to do.

    Args:
        before: the mean loss of the steps before these.
    """
    found = _sparse_advice(records, num_experts) if num_experts else {}
    skipped = [record for record in records if record.skipped]
    if skipped:
        found["skipped"] = (
            f"{len(skipped)} steps were skipped for numbers that are not finite, first seen in the "
            f"{skipped[0].culprit}: lower the learning rate, or clip harder"
        )
    highest = max(records, key=lambda record: record.loss)
    if before is not None and highest.loss > _SPIKE * before:
        found["spike"] = (
            f"the loss jumped to {highest.loss:.3g} at step {highest.step}, from a mean of "
            f"{before:.3g}: lower the learning rate, or go on from an earlier checkpoint with "
            "--resume-from"
        )
    return found


def _sparse_advice(records: Sequence[StepRecord], num_experts: int) -> dict[str, str]:
    """What the routers do wrong."""
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
    idle = _idle(records)
    if idle and len(records) >= _IDLE_STEPS:
        shown = ", ".join(f"{expert} of sparse layer {layer}" for layer, expert in sorted(idle)[:4])
        more = f" and {len(idle) - 4} others" if len(idle) > 4 else ""
        found["idle"] = (
            f"{len(idle)} experts had no token for {len(records)} steps (expert {shown}{more}): "
            "raise the load_balance coefficient, or take a router that balances itself "
            "(sigmoid_top_k, expert_choice)"
        )
    return found


def _idle(records: Sequence[StepRecord]) -> set[tuple[int, int]]:
    """The experts that had no token in any of some steps."""
    return set.intersection(*(set(record.idle) for record in records)) if records else set()
