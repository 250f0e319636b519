"""A training run in a directory: settings, metrics, checkpoints, and going on where it stopped."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from moezoo.adapters.writer import replacing_file, typed_errors
from moezoo.errors import CheckpointError, ConfigError, ResumeMismatch, TrainingError
from moezoo.training.batches import Batches
from moezoo.training.checkpoints import checkpoints, json_row, restore, save_checkpoint
from moezoo.training.loop import (
    Objective,
    StepRecord,
    TrainingState,
    evaluate,
    fit,
    likelihood,
    start,
)
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.tensorboard import Board
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
    objective: Objective = likelihood,
    resume_from: int | None = None,
    strict: bool = True,
    tensorboard: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
) -> RunResult:
    """Train in `directory`, from its newest checkpoint if it has one.

    Writes config.json (settings), metrics.jsonl (a line per step and evaluation) and
    checkpoints/step-N. SIGTERM and SIGINT save and leave. A run that is killed continues bit for
    bit: same settings, same thread count.

    Args:
        facts: what else decides the numbers (data, seed, model); checked when the run goes on.
        objective: what is minimised; see `fit`.
        resume_from: go on from the checkpoint of this step, and remove later ones. None: newest.
        strict: refuse to go on with other settings; more steps than before are none, unless the
            rate falls linearly to the last one.
        tensorboard: write scalars into OUT/tensorboard too.

    Raises ResumeMismatch, CheckpointError for a corrupt checkpoint, NonFiniteLoss, TrainingError
    where memory does not suffice, or SaveError; the last good checkpoint stays.
    """
    root = Path(directory)
    everything = {**(facts or {}), "recipe": asdict(settings), "steps": steps}
    state = start(model, settings, steps=steps)
    # Only a rate that falls to zero at the last step depends on how many there are.
    free = () if settings.schedule == "linear" else ("steps",)
    _go_on(state, root / "checkpoints", everything, resume_from, strict=strict, free=free)
    if state.step > steps:
        reason = "the run is past the number of steps that is asked for"
        raise TrainingError(reason, expected=f"at least {state.step}", found=steps)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")
    board = Board(root / "tensorboard", state.step) if tensorboard else None
    metrics = Metrics(root / "metrics.jsonl", state.step, board)
    sparse = getattr(getattr(model, "config", None), "num_experts", 0)
    watch = Watch(steps=steps, every=table_every, num_experts=sparse)
    losses: dict[int, float] = {}

    def measure(state: TrainingState) -> None:
        due = state.step == steps or state.step % evaluate_every == 0
        if held_out is not None and due:
            found = evaluate(model, held_out, count=held_out_batches)
            losses[state.step] = found["cross_entropy"]
            metrics.write({"step": state.step, "held_out": found["cross_entropy"]})

    with stopping() as stop:

        def after(state: TrainingState, record: StepRecord) -> bool:
            _report(record, metrics, watch)
            if on_step is not None:
                on_step(record)
            measure(state)
            if state.step == steps or stop() or state.step % save_every == 0:
                save_checkpoint(state, root / "checkpoints", everything)
            return stop()

        try:
            fit(
                state,
                batches,
                settings,
                steps=steps,
                objective=objective,
                on_step=after,
                nonfinite=nonfinite,
            )
        finally:
            metrics.close()
        return RunResult(state, losses, stop())


def _report(record: StepRecord, metrics: Metrics, watch: Watch) -> None:
    metrics.write(json_row(record))
    warnings = watch(record)
    if warnings:
        metrics.write({"step": record.step, "warnings": warnings})


def _go_on(
    state: TrainingState,
    folder: Path,
    settings: Mapping[str, Any],
    resume_from: int | None,
    *,
    strict: bool,
    free: Collection[str],
) -> None:
    """Restore the newest checkpoint, or the one that is asked for; nothing where none is there."""
    existing = {int(path.name.removeprefix("step-")): path for path in checkpoints(folder)}
    if resume_from is not None and resume_from not in existing:
        raise ResumeMismatch(
            f"there is no checkpoint of step {resume_from}",
            path=folder,
            key="resume_from",
            expected=" or ".join(map(str, existing)) or None,
        )
    if not existing:
        return
    step = max(existing) if resume_from is None else resume_from
    try:
        restore(state, existing[step], settings, strict=strict, free=free)
    except CheckpointError as error:
        earlier = [str(other) for other in existing if other < step]
        if earlier:
            error.hint = f"The one before is whole, perhaps: --resume-from {earlier[-1]}."
        raise
    for later in [path for other, path in existing.items() if other > step]:
        shutil.rmtree(later)


class Metrics:
    """A JSONL file of measurements; lines past the step that a run goes on from are cut off.

    Raises SaveError when the disk is full.
    """

    def __init__(self, path: Path, step: int, board: Board | None = None) -> None:
        self.path, self.board = path, board
        kept = [line for line in _lines(path) if _step(line) <= step]
        with replacing_file(path, overwrite=True) as stage:
            stage.write_text("".join(kept), encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; a kill loses at most the line that is being written."""
        with typed_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            self.board.write(row)

    def close(self) -> None:
        """Close the TensorBoard file, if there is one."""
        if self.board is not None:
            self.board.close()


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
