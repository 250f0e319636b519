"""The training loop: one function, one step at a time, everything it sees in a record."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moezoo.errors import NonFiniteLoss, TrainingError
from moezoo.functional.statistics import LayerStats, read_stats, sum_of
from moezoo.layer import MoE
from moezoo.models.output import SwitchOutput
from moezoo.records import Assignment, Routing
from moezoo.routers.base import Router
from moezoo.training.batches import IGNORED, Batches
from moezoo.training.culprits import culprit
from moezoo.training.recipes import TrainingRecipe, make_optimizer, make_schedule

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
    """All that a run needs to go on: what a checkpoint stores."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    step: int = 0
    history: list[StepRecord] = field(default_factory=list)


def start(model: nn.Module, settings: TrainingRecipe, *, steps: int) -> TrainingState:
    """A fresh state: new optimizer, step 0."""
    optimizer = make_optimizer(model, settings)
    return TrainingState(model, optimizer, make_schedule(optimizer, settings, steps))


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

    Args:
        batches: step -> batch; with accumulation, step * accumulate + i.
        objective: (model, batch) -> output whose loss is minimised; see also `Distillation`.
        on_step: called after each step (progress, evaluation, checkpoints); True ends the run.
        nonfinite: "stop" or "skip" a step whose loss or gradient is NaN or infinite; a hundred
            skips in a row stop too.

    Returns:
        The records of these steps. Raises NonFiniteLoss naming the step and the first layer whose
        numbers are not finite; the weights are then those of the step before. TrainingError where
        memory does not suffice.
    """
    state.model.train()
    first = len(state.history)
    while state.step < steps:
        record = training_step(state, batches, settings, objective=objective, nonfinite=nonfinite)
        state.history.append(record)
        if on_step is not None and on_step(state, record):
            break
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
    parts = [
        {name: tensor.to(device) for name, tensor in batches(first + i).items()}
        for i in range(settings.accumulate)
    ]
    with _typed_memory_errors(state.step + 1):
        losses, seen = _gradients(state.model, parts, settings, objective)
    norm = _clipped_norm(state.model, settings)
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
        tokens=sum(int(p["attention_mask"].sum()) + _targets(p) for p in parts),
        seconds=time.perf_counter() - started,
        skipped=not finite,
        culprit=origin,
        **_summary(seen),
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, count: int) -> dict[str, float]:
    """Cross entropy in nats per target token over `count` batches, and the share of drops.

    The model is left in the mode that it was in.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, targets, routings = 0.0, 0, _Seen()
    for step in range(count):
        batch = {name: tensor.to(device) for name, tensor in batches(step).items()}
        output = model(**batch)
        seen = int((batch["labels"] != IGNORED).sum())
        total += float(output.losses["cross_entropy"]) * seen
        targets += seen
        routings.add(output.routing)
    model.train(was_training)
    summary = _summary(routings)
    summary.pop("idle", None)
    return {"cross_entropy": total / max(targets, 1), "targets": targets, **summary}


@torch.no_grad()
def expert_loads(model: nn.Module, batches: Batches, *, count: int) -> list[LayerStats]:
    """Statistics of every sparse layer over `count` batches, encoder first."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    seen = _Seen()
    for step in range(count):
        batch = {name: tensor.to(device) for name, tensor in batches(step).items()}
        seen.add(model(**batch).routing)
    model.train(was_training)
    return read_stats(seen.sums)


class _Seen:
    """What routings add up to, layer by layer. The routings themselves, of the size of all tokens,
    are kept for the routers that adapt to them and for no others.

    Args:
        to_adapt: the model whose routers will adapt to what is seen; None: none will.
    """

    def __init__(self, to_adapt: nn.Module | None = None) -> None:
        modules = () if to_adapt is None else to_adapt.modules()
        routers = [module.router for module in modules if isinstance(module, MoE)]
        self._adaptive = {i: router for i, router in enumerate(routers) if _adapts(router)}
        self._kept: dict[int, list[Routing]] = {index: [] for index in self._adaptive}
        self.sums: list[Tensor] = []
        self.soft: list[bool] = []

    def add(self, routings: Sequence[Routing]) -> None:
        """The routings of all sparse layers of one batch."""
        sums = [sum_of([routing]) for routing in routings]
        before = self.sums or [torch.zeros_like(each) for each in sums]
        self.sums = [a + b for a, b in zip(before, sums, strict=True)]
        self.soft = [not isinstance(routing.assignment, Assignment) for routing in routings]
        for index, kept in self._kept.items():
            kept.append(routings[index])

    def adapt(self) -> None:
        """Let routers adapt what no gradient trains (balancing biases, thresholds, sparsity) to
        their layer's routings.
        """
        for index, router in self._adaptive.items():
            router.adapt(self._kept[index])


def _adapts(router: Router) -> bool:
    return type(router).adapt is not Router.adapt or "adapt" in vars(router)


def _gradients(
    model: nn.Module, parts: Sequence[Batch], settings: TrainingRecipe, objective: Objective
) -> tuple[dict[str, float], _Seen]:
    """Backward over all parts; their losses by name, "total" among them, and what routers did."""
    everything = max(sum(map(_targets, parts)), 1)
    losses = {"total": 0.0}
    seen = _Seen(to_adapt=model)
    for part in parts:
        # Weighing by target tokens makes accumulation equal to one large batch.
        share = _targets(part) / everything
        with _precision(settings, part["labels"].device):
            output = objective(model, part)
        assert output.loss is not None
        loss: Tensor = output.loss * share
        loss.backward()  # type: ignore[no-untyped-call]
        for name, value in (("total", output.loss), *output.losses.items()):
            losses[name] = losses.get(name, 0.0) + float(value.detach()) * share
        seen.add(output.routing)
    return losses, seen


def _targets(part: Batch) -> int:
    return int((part["labels"] != IGNORED).sum())


def _clipped_norm(model: nn.Module, settings: TrainingRecipe) -> float:
    parameters = [p for p in model.parameters() if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(parameters, settings.clip or math.inf))


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


def _summary(seen: _Seen) -> dict[str, Any]:
    """Drops, balance and entropy over sparse layers that choose; empty without them."""
    layers = zip(read_stats(seen.sums), seen.soft, strict=True)
    stats = {index: layer for index, (layer, soft) in enumerate(layers) if not soft}
    if not stats:
        return {}
    offered = sum(s.offered for s in stats.values())
    entropies = [s.entropy for s in stats.values() if not math.isnan(s.entropy)]
    idle = tuple((index, expert) for index, s in stats.items() for expert in s.dead)
    return {
        "dropped": sum(s.dropped * s.offered for s in stats.values()) / max(offered, 1),
        "max_violation": max(s.max_violation for s in stats.values()),
        "entropy": sum(entropies) / len(entropies) if entropies else math.nan,
        "dead": len(idle),
        "idle": idle,
    }


def mean_of(records: Sequence[StepRecord], name: str) -> float:
    """The mean of a field over records."""
    return sum(float(getattr(record, name)) for record in records) / max(len(records), 1)
