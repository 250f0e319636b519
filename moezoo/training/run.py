"""A training run in a directory: settings, metrics, checkpoints, and going on where it stopped."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from moezoo.errors import ConfigError
from moezoo.training.batches import Batches
from moezoo.training.checkpoints import checkpoints, json_row, restore, save_checkpoint
from moezoo.training.loop import StepRecord, TrainingState, evaluate, fit, start
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.watch import Watch


@dataclass(frozen=True)
class RunResult:
    """How a run ended: at which step, the held-out loss by step, whether a signal ended it."""

    state: TrainingState
    held_out: dict[int, float]
    interrupted: bool


def run_training(
    model: nn.Module,
    batches: Batches,
    settings: TrainingRecipe,
    directory: str | Path,
    *,
    steps: int,
    held_out: Batches | None = None,
    evaluate_every: int = 500,
    held_out_batches: int = 20,
    save_every: int = 500,
    table_every: int = 50,
    facts: Mapping[str, Any] | None = None,
    nonfinite: str = "stop",
    on_step: Callable[[StepRecord], None] | None = None,
) -> RunResult:
    """Train in `directory`, from its newest checkpoint if it has one.

    Writes config.json (settings), metrics.jsonl (a line per step and evaluation) and
    checkpoints/step-N. SIGTERM and SIGINT save and leave. A run that is killed continues bit for
    bit: same settings, same thread count.

    Args:
        facts: what else decides the numbers (data, seed, model); checked when the run goes on.

    Raises ResumeMismatch, NonFiniteLoss (the last good checkpoint stays) or SaveError.
    """
    root = Path(directory)
    everything = {**(facts or {}), "recipe": asdict(settings), "steps": steps}
    state = start(model, settings, steps=steps)
    existing = checkpoints(root / "checkpoints")
    if existing:
        restore(state, existing[-1], everything)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")
    metrics = Metrics(root / "metrics.jsonl", state.step)
    sparse = getattr(getattr(model, "config", None), "num_experts", 0)
    watch = Watch(steps=steps, every=table_every, num_experts=sparse)
    losses: dict[int, float] = {}

    with stopping() as stop:

        def after(state: TrainingState, record: StepRecord) -> bool:
            metrics.write(json_row(record))
            warnings = watch(record)
            if warnings:
                metrics.write({"step": record.step, "warnings": warnings})
            if on_step is not None:
                on_step(record)
            last = state.step == steps
            if held_out is not None and (last or state.step % evaluate_every == 0):
                found = evaluate(model, held_out, count=held_out_batches)
                losses[state.step] = found["cross_entropy"]
                metrics.write({"step": state.step, "held_out": found["cross_entropy"]})
            if last or stop() or state.step % save_every == 0:
                save_checkpoint(state, root / "checkpoints", everything)
            return stop()

        fit(state, batches, settings, steps=steps, on_step=after, nonfinite=nonfinite)
        return RunResult(state, losses, stop())


class Metrics:
    """A JSONL file of measurements; lines past the step that a run goes on from are cut off."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if _step(line) <= step]
        path.write_text("".join(kept), encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; a kill loses at most the line that is being written."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Gives whether SIGTERM or SIGINT has come; the second SIGINT interrupts as usual."""
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not the main thread: signals are not ours to take
        yield lambda: False
        return
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_output(directory: str | Path, *, resume: bool) -> None:
    """Refuse to mix a new run into an old one. Raises ConfigError."""
    if checkpoints(Path(directory) / "checkpoints") and not resume:
        hint = "Pass --resume to continue it, or choose another directory."
        raise ConfigError(f"{directory} holds a run already", field="out", hint=hint)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut by a kill
