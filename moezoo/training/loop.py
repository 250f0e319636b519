"""The training loop: one function, one step at a time, everything it sees in a record."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moezoo.errors import NonFiniteLoss, TrainingError
from moezoo.functional.collective import num_ranks
from moezoo.functional.shards import unwrapped
from moezoo.functional.statistics import LayerStats, read_stats
from moezoo.models.output import SwitchOutput
from moezoo.training.batches import IGNORED, Batches
from moezoo.training.culprits import culprit
from moezoo.training.ranks import (
    average_gradients,
    clipped_norm,
    gathered,
    guarded,
    mean_losses,
    mesh_of_gradients,
    reducing,
    seed_of_step,
    shares,
    summed,
)
from moezoo.training.recipes import TrainingRecipe, make_optimizer, make_schedule
from moezoo.training.seen import Seen, summary

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], SwitchOutput]
_MAX_SKIPS = 100


def likelihood(model: nn.Module, batch: Batch) -> SwitchOutput:
    """The usual objective: cross entropy with the labels, plus the configured router losses."""
    output: SwitchOutput = model(**batch)
    return output


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    loss: cross entropy plus weighted router losses, per target token. losses: its parts,
    unweighted. dropped: share of token-expert pairs that were not computed. max_violation: max load
    / mean load - 1, the worst layer's. dead: experts without a token, over all layers. entropy:
    mean of the router's, in nats. idle: those experts, as (sparse layer, expert). skipped: the
    gradient was not finite and the weights are unchanged; culprit: where that began.
    """

    step: int
    loss: float
    losses: dict[str, float]
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    dropped: float = 0.0
    max_violation: float = 0.0
    entropy: float = math.nan
    dead: int = 0
    idle: tuple[tuple[int, int], ...] = ()
    skipped: bool = False
    culprit: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class TrainingState:
    """All that a run needs to go on: what a checkpoint stores, but for the history of this process.

    seed: of the random numbers of steps that several ranks take together; one process draws on from
    where it is. mesh: that gradients are averaged over after backward (see `start`). watch: see
    `Watch.memory`.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    step: int = 0
    history: list[StepRecord] = field(default_factory=list)
    seed: int = 0
    mesh: DeviceMesh | None = None
    watch: dict[str, Any] = field(default_factory=dict)


def start(
    model: nn.Module, settings: TrainingRecipe, *, steps: int, mesh: DeviceMesh | None = None
) -> TrainingState:
    """A fresh state: new optimizer, step 0.

    Args:
        mesh: of a model after `moezoo.parallel.expert_parallel`; others need none.
    """
    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, settings, steps)
    seed, mesh = gathered(torch.initial_seed())[0], mesh_of_gradients(model, mesh)
    return TrainingState(model, optimizer, schedule, seed=seed, mesh=mesh)


def fit(
    state: TrainingState,
    batches: Batches,
    settings: TrainingRecipe,
    *,
    steps: int,
    objective: Objective = likelihood,
    on_step: Callable[[TrainingState, StepRecord], bool | None] | None = None,
    nonfinite: str = "stop",
) -> list[StepRecord]:
    """Train from `state.step` to `steps`.

    With torch.distributed every rank calls it, with rows of its own; the records are those of all
    ranks together. Gradients are averaged unless the model does so itself (DDP, FSDP2).

    Args:
        batches: step -> batch; with accumulation, step * accumulate + i. See `ranks.of_rank`.
        objective: (model, batch) -> output whose loss is minimised; see also `Distillation`.
        on_step: called after each step (progress, evaluation, checkpoints); True ends the run.
        nonfinite: "stop" or "skip" a step whose loss or gradient is NaN or infinite; a hundred
            skips in a row stop too.

    Returns:
        The records of these steps. Raises NonFiniteLoss naming the step and the first layer whose
        numbers are not finite; the weights are then those of the step before. TrainingError where
        memory does not suffice. RankLost where another rank is gone (see `moezoo.parallel.guard`).
    """
    state.model.train()
    first, ended = len(state.history), False
    while state.step < steps and not ended:
        with guarded(state.step + 1):
            record = training_step(
                state, batches, settings, objective=objective, nonfinite=nonfinite
            )
            state.history.append(record)
            ended = on_step is not None and bool(on_step(state, record))
    return state.history[first:]


def training_step(
    state: TrainingState,
    batches: Batches,
    settings: TrainingRecipe,
    *,
    objective: Objective = likelihood,
    nonfinite: str = "stop",
) -> StepRecord:
    """One optimizer step over `settings.accumulate` batches."""
    started = time.perf_counter()
    device = next(state.model.parameters()).device
    first = state.step * settings.accumulate
    if num_ranks() > 1:
        torch.manual_seed(seed_of_step(state.seed, state.step))
    parts = [
        {name: tensor.to(device) for name, tensor in batches(first + i).items()}
        for i in range(settings.accumulate)
    ]
    with _typed_memory_errors(state.step + 1):
        losses, seen = _gradients(state.model, parts, settings, objective)
        average_gradients(state.model, state.mesh)
    norm = clipped_norm(state.model, settings.clip or math.inf)
    finite = math.isfinite(norm) and math.isfinite(losses["total"])
    origin = "" if finite else _explained(state, parts, settings, objective, norm, nonfinite)
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if finite:
        seen.adapt()
    rate = float(state.schedule.get_last_lr()[0])
    with warnings.catch_warnings():
        # torch takes a skipped first step for steps in the wrong order.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler")
        state.schedule.step()
    state.step += 1
    return StepRecord(
        step=state.step,
        loss=losses.pop("total"),
        losses=losses,
        gradient_norm=norm,
        learning_rate=rate,
        tokens=summed(sum(int(p["attention_mask"].sum()) + _targets(p) for p in parts), device),
        seconds=time.perf_counter() - started,
        skipped=not finite,
        culprit=origin,
        **summary(seen.of_all_ranks()),
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, count: int) -> dict[str, float]:
    """Cross entropy in nats per target token over `count` batches, and the share of drops; of all
    ranks' batches together, where there are several.

    The model is left in the mode that it was in.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, targets, seen = 0.0, 0, Seen()
    for step in range(count):
        batch = {name: tensor.to(device) for name, tensor in batches(step).items()}
        output = model(**batch)
        found = _targets(batch)
        total += float(output.losses["cross_entropy"]) * found
        targets += found
        seen.add(output.routing)
    model.train(was_training)
    total = mean_losses({"": total}, device)[""] * num_ranks()
    targets = summed(targets, device)
    stats = summary(seen.of_all_ranks())
    stats.pop("idle", None)
    return {"cross_entropy": total / max(targets, 1), "targets": targets, **stats}


@torch.no_grad()
def expert_loads(model: nn.Module, batches: Batches, *, count: int) -> list[LayerStats]:
    """Statistics of every sparse layer over `count` batches of every rank, encoder first."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    seen = Seen()
    for step in range(count):
        batch = {name: tensor.to(device) for name, tensor in batches(step).items()}
        seen.add(model(**batch).routing)
    model.train(was_training)
    return read_stats(seen.of_all_ranks().sums)


def _gradients(
    model: nn.Module, parts: Sequence[Batch], settings: TrainingRecipe, objective: Objective
) -> tuple[dict[str, float], Seen]:
    """Backward over all parts; their losses by name, "total" among them, and what routers did."""
    device = parts[0]["labels"].device
    losses = {"total": 0.0}
    seen = Seen(to_adapt=unwrapped(model))
    # Weighing by target tokens makes accumulation, and many ranks, equal to one large batch.
    weighed = list(zip(parts, shares([_targets(part) for part in parts], device), strict=True))
    for index, (part, share) in enumerate(weighed):
        with reducing(model, last=index == len(parts) - 1):
            with _precision(settings, device):
                output = objective(model, part)
            share.of(output, model).backward()  # type: ignore[no-untyped-call]
        for name, value in share.parts(output, model).items():
            losses[name] = losses.get(name, 0.0) + value
        seen.add(output.routing)
    return mean_losses(losses, device), seen


def _targets(part: Batch) -> int:
    return int((part["labels"] != IGNORED).sum())


def _explained(
    state: TrainingState,
    parts: Sequence[Batch],
    settings: TrainingRecipe,
    objective: Objective,
    norm: float,
    nonfinite: str,
) -> str:
    """Where a step that is not finite went wrong. Raises NonFiniteLoss unless it may be skipped."""

    def again(part: Batch) -> None:
        with _precision(settings, part["labels"].device):
            objective(state.model, part)

    where = culprit(state.model, [partial(again, part) for part in parts])
    skips = [record.skipped for record in state.history[-_MAX_SKIPS:]]
    hopeless = len(skips) == _MAX_SKIPS and all(skips)
    if nonfinite == "skip" and not hopeless:
        return where
    state.optimizer.zero_grad(set_to_none=True)
    advice = (
        f"{_MAX_SKIPS} steps in a row were skipped. Go on from an earlier checkpoint."
        if hopeless
        else "Lower the learning rate, or pass nonfinite='skip'."
    )
    reason = f"step {state.step + 1}: not finite, first seen in the {where.removeprefix('the ')}"
    raise NonFiniteLoss(f"{reason} (gradient norm {norm})", key=where, hint=advice)


@contextmanager
def _typed_memory_errors(step: int) -> Iterator[None]:
    """Memory that does not suffice, as a TrainingError with what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in text:
            raise
        hint = (
            "Lower the batch size and raise `accumulate`, shorten the inputs, or turn on gradient "
            "checkpointing; the checkpoints are unharmed."
        )
        raise TrainingError(f"step {step}: out of memory", hint=hint) from error


def _precision(settings: TrainingRecipe, device: torch.device) -> AbstractContextManager[Any]:
    if settings.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def mean_of(records: Sequence[StepRecord], name: str) -> float:
    """The mean of a field over records."""
    return sum(float(getattr(record, name)) for record in records) / max(len(records), 1)
