"""The training loop: one function, one step at a time, everything it sees in a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moezoo.errors import NonFiniteLoss
from moezoo.functional.statistics import LayerStats, layer_stats
from moezoo.layer import MoE
from moezoo.records import Assignment, Routing
from moezoo.training.batches import IGNORED, Batches
from moezoo.training.recipes import TrainingRecipe, make_optimizer, make_schedule


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    loss: cross entropy plus weighted router losses, per target token. losses: its parts,
    unweighted. dropped: share of token-expert pairs that were not computed. max_violation: max load
    / mean load - 1, the worst layer's. dead: experts without a token, over all layers. entropy:
    mean of the router's, in nats. skipped: the gradient was not finite and the weights are
    unchanged.
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
    skipped: bool = False

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
    on_step: Callable[[TrainingState, StepRecord], bool | None] | None = None,
    nonfinite: str = "stop",
) -> list[StepRecord]:
    """Train from `state.step` to `steps`.

    Args:
        batches: step -> batch; with accumulation, step * accumulate + i.
        on_step: called after each step (progress, evaluation, checkpoints); True ends the run.
        nonfinite: "stop" or "skip" a step whose loss or gradient is NaN or infinite.

    Returns:
        The records of these steps. Raises NonFiniteLoss naming the step and the first layer whose
        gradient is not finite; the weights are then those of the step before.
    """
    state.model.train()
    first = len(state.history)
    while state.step < steps:
        record = training_step(state, batches, settings, nonfinite=nonfinite)
        state.history.append(record)
        if on_step is not None and on_step(state, record):
            break
    return state.history[first:]


def training_step(
    state: TrainingState, batches: Batches, settings: TrainingRecipe, *, nonfinite: str = "stop"
) -> StepRecord:
    """One optimizer step over `settings.accumulate` batches."""
    started = time.perf_counter()
    device = next(state.model.parameters()).device
    first = state.step * settings.accumulate
    parts = [batches(first + i) for i in range(settings.accumulate)]
    targets = [int((part["labels"] != IGNORED).sum()) for part in parts]
    losses: dict[str, float] = {}
    routings: list[Routing] = []
    total, tokens = 0.0, 0
    for part, count in zip(parts, targets, strict=True):
        # Weighing by target tokens makes accumulation equal to one large batch.
        share = count / max(sum(targets), 1)
        batch = {name: tensor.to(device) for name, tensor in part.items()}
        with _precision(settings, device):
            output = state.model(**batch)
        (output.loss * share).backward()
        total += float(output.loss.detach()) * share
        for name, value in output.losses.items():
            losses[name] = losses.get(name, 0.0) + float(value.detach()) * share
        tokens += int(part["attention_mask"].sum()) + count
        routings += output.routing
    norm, skipped = _update(state, settings, total, nonfinite)
    if not skipped:
        _adapt_routers(state.model, routings)
    rate = float(state.schedule.get_last_lr()[0])
    state.schedule.step()
    state.step += 1
    return StepRecord(
        step=state.step,
        loss=total,
        losses=losses,
        gradient_norm=norm,
        learning_rate=rate,
        tokens=tokens,
        seconds=time.perf_counter() - started,
        skipped=skipped,
        **_summary(routings),
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, count: int) -> dict[str, float]:
    """Cross entropy in nats per target token over `count` batches, and the share of drops.

    The model is left in the mode that it was in.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, targets, routings = 0.0, 0, []
    for step in range(count):
        batch = {name: tensor.to(device) for name, tensor in batches(step).items()}
        output = model(**batch)
        seen = int((batch["labels"] != IGNORED).sum())
        total += float(output.losses["cross_entropy"]) * seen
        targets += seen
        routings += output.routing
    model.train(was_training)
    return {"cross_entropy": total / max(targets, 1), "targets": targets, **_summary(routings)}


@torch.no_grad()
def expert_loads(model: nn.Module, batches: Batches, *, count: int) -> list[LayerStats]:
    """Statistics of every sparse layer over `count` batches, encoder first."""
    was_training = model.training
    model.eval()
    layers: list[list[Routing]] = []
    for step in range(count):
        routing = model(**batches(step)).routing
        layers = layers or [[] for _ in routing]
        for seen, layer in zip(layers, routing, strict=True):
            seen.append(layer)
    model.train(was_training)
    return [layer_stats(seen) for seen in layers]


def _update(
    state: TrainingState, settings: TrainingRecipe, loss: float, nonfinite: str
) -> tuple[float, bool]:
    """Clip and step; returns the gradient norm and whether the step was skipped."""
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    limit = settings.clip or math.inf
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    finite = math.isfinite(norm) and math.isfinite(loss)
    if not finite and nonfinite == "stop":
        culprit = _first_nonfinite(state.model)
        state.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLoss(
            f"step {state.step + 1}: the loss is {loss}, the gradient norm {norm}",
            key=culprit,
            hint=f"First seen in {culprit}. Lower the learning rate, or pass nonfinite='skip'.",
        )
    if finite:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return norm, not finite


def _adapt_routers(model: nn.Module, routings: Sequence[Routing]) -> None:
    """Let routers adapt what no gradient trains (balancing biases, thresholds, sparsity) to the
    step's routings, which come layer by layer for one batch part after another.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for index, layer in enumerate(layers):
        layer.router.adapt(routings[index :: len(layers)])


def _first_nonfinite(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        for tensor in (parameter, parameter.grad):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return name
    return "the loss alone"


def _precision(settings: TrainingRecipe, device: torch.device) -> AbstractContextManager[Any]:
    if settings.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _summary(routings: Sequence[Routing]) -> dict[str, Any]:
    """Drops, balance and entropy over sparse layers; empty without them."""
    sparse = [r for r in routings if isinstance(r.assignment, Assignment)]
    if not sparse:
        return {}
    stats = [layer_stats([routing]) for routing in sparse]
    offered = sum(s.offered for s in stats)
    entropies = [s.entropy for s in stats if not math.isnan(s.entropy)]
    return {
        "dropped": sum(s.dropped * s.offered for s in stats) / max(offered, 1),
        "max_violation": max(s.max_violation for s in stats),
        "entropy": sum(entropies) / len(entropies) if entropies else math.nan,
        "dead": sum(len(s.dead) for s in stats),
    }


def mean_of(records: Sequence[StepRecord], name: str) -> float:
    """The mean of a field over records."""
    return sum(float(getattr(record, name)) for record in records) / max(len(records), 1)
