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
from typing import TYPE_CHECKING, Any

from torch import nn

from moezoo.adapters.writer import replacing_file, typed_errors
from moezoo.errors import CheckpointError, ConfigError, ResumeMismatch, TrainingError
from moezoo.functional.collective import num_ranks, rank
from moezoo.functional.shards import unwrapped
from moezoo.training.batches import Batches
from moezoo.training.checkpoints import (
    checkpoint_of,
    checkpoints,
    json_row,
    restore,
    save_checkpoint,
)
from moezoo.training.loop import (
    Objective,
    StepRecord,
    TrainingState,
    evaluate,
    fit,
    likelihood,
    start,
)
from moezoo.training.ranks import (
    batch_of_all_ranks,
    check_agreement,
    digest,
    gathered,
    of_rank,
    on_any_rank,
)
from moezoo.training.recipes import TrainingRecipe
from moezoo.training.tensorboard import Board, summary_writer
from moezoo.training.watch import Watch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
    mesh: DeviceMesh | None = None,
) -> RunResult:
    """Train in `directory`, from its newest checkpoint if it has one.

    Writes config.json (settings), metrics.jsonl (a line per step and evaluation) and
    checkpoints/step-N. SIGTERM and SIGINT save and leave. A run that is killed continues bit for
    bit: same settings, same thread count.

    Where several ranks train, all call it, with the same batches: each takes its own rows, and rank
    0 alone writes what is not a checkpoint. A router loss whose config says no scope is over the
    batch of all ranks. Any number of ranks may go on.

    Args:
        facts: what else decides the numbers (data, seed, model); checked when the run goes on.
        objective: what is minimised; see `fit`.
        resume_from: go on from the checkpoint of this step, and remove later ones. None: newest.
        strict: refuse to go on with other settings; more steps than before are none, unless the
            rate falls linearly to the last one.
        tensorboard: write scalars into OUT/tensorboard too.
        mesh: of a model after `moezoo.parallel.expert_parallel`; others need none.

    Raises ResumeMismatch, CheckpointError for a corrupt checkpoint, NonFiniteLoss, TrainingError
    where memory does not suffice, or SaveError, RanksDiffer where ranks were not started alike,
    RankLost where one is gone; the last good checkpoint stays.
    """
    if tensorboard:
        summary_writer()  # rank 0 alone writes, and the others would wait for it
    root = Path(directory)
    everything = {**(facts or {}), "recipe": asdict(settings), "steps": steps}
    state = start(model, settings, steps=steps, mesh=mesh)
    if num_ranks() > 1:
        _check_ranks_alike(model, batches, everything)
    # Only a rate that falls to zero at the last step depends on how many there are.
    free = () if settings.schedule == "linear" else ("steps",)
    _go_on(state, root / "checkpoints", everything, resume_from, strict=strict, free=free)
    if state.step > steps:
        reason = "the run is past the number of steps that is asked for"
        raise TrainingError(reason, expected=f"at least {state.step}", found=steps)
    batches, held_out = of_rank(batches), None if held_out is None else of_rank(held_out)
    log = _Log(root, state, everything, steps=steps, every=table_every, tensorboard=tensorboard)
    losses: dict[int, float] = {}
    device = next(model.parameters()).device

    def measure(state: TrainingState) -> None:
        due = state.step == steps or state.step % evaluate_every == 0
        if held_out is not None and due:
            found = evaluate(model, held_out, count=held_out_batches)
            losses[state.step] = found["cross_entropy"]
            log.write({"step": state.step, "held_out": found["cross_entropy"]})

    with stopping() as stopped, batch_of_all_ranks(model):

        def after(state: TrainingState, record: StepRecord) -> bool:
            log.step(record)
            if on_step is not None:
                on_step(record)
            measure(state)
            ends = on_any_rank(stopped(), device)
            if state.step == steps or ends or state.step % save_every == 0:
                state.watch = log.memory()
                save_checkpoint(state, root / "checkpoints", everything)
            return ends

        try:
            fit(state, batches, settings, steps=steps, objective=objective, on_step=after,
                nonfinite=nonfinite)  # fmt: skip
        finally:
            log.close()
        return RunResult(state, losses, on_any_rank(stopped(), device))


class _Log:
    """config.json, the lines of metrics.jsonl and the table of a run; on rank 0 alone."""

    def __init__(
        self,
        root: Path,
        state: TrainingState,
        settings: Mapping[str, Any],
        *,
        steps: int,
        every: int,
        tensorboard: bool,
    ) -> None:
        self.metrics: Metrics | None = None
        if rank():
            return
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        board = Board(root / "tensorboard", state.step) if tensorboard else None
        self.metrics = Metrics(root / "metrics.jsonl", state.step, board)
        sparse = getattr(getattr(unwrapped(state.model), "config", None), "num_experts", 0)
        self.watch = Watch(steps=steps, every=every, num_experts=sparse, memory=state.watch)

    def memory(self) -> dict[str, Any]:
        """What the table and its warnings go on from."""
        return {} if self.metrics is None else self.watch.memory()

    def step(self, record: StepRecord) -> None:
        """A line and perhaps a row for a step, with the warnings that it caused."""
        if self.metrics is None:
            return
        self.metrics.write(json_row(record))
        warnings = self.watch(record)
        if warnings:
            self.metrics.write({"step": record.step, "warnings": warnings})

    def write(self, row: Mapping[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(row)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()


def _check_ranks_alike(model: nn.Module, batches: Batches, facts: Mapping[str, Any]) -> None:
    weights = digest(dict(unwrapped(model).named_parameters()))
    check_agreement({**facts, "a batch": digest(batches(0)), "first weights": weights})


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
    found = gathered(sorted(int(p.name.removeprefix("step-")) for p in checkpoints(folder)))[0]
    if resume_from is not None and resume_from not in found:
        raise ResumeMismatch(
            f"there is no checkpoint of step {resume_from}",
            path=folder,
            key="resume_from",
            expected=" or ".join(map(str, found)) or None,
        )
    if not found:
        return
    step = max(found) if resume_from is None else resume_from
    try:
        restore(state, checkpoint_of(folder, step), settings, strict=strict, free=free)
    except CheckpointError as error:
        earlier = [str(other) for other in found if other < step]
        if earlier:
            error.hint = f"The one before is whole, perhaps: --resume-from {earlier[-1]}."
        raise
    gathered(None)  # every rank has read it
    for later in [other for other in found if other > step] if rank() == 0 else ():
        shutil.rmtree(checkpoint_of(folder, later))


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
