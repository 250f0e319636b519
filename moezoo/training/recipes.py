"""How to train: optimizer, schedule, precision, clipping; the paper's settings by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moezoo.errors import ConfigError, did_you_mean
from moezoo.training.adafactor import Adafactor


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of a run; plain values, so that a run can write them down.

    Args:
        optimizer: "adamw" (fused) or "adafactor" (see `moezoo.training.adafactor`).
        learning_rate: the peak. schedule: "constant", "linear" (to 0 at the last step) or
            "inverse_sqrt" (peak * sqrt(warmup / step)), all after a linear `warmup`; or "t5", which
            has the peak from the first step to step `warmup`, then as "inverse_sqrt".
        weight_decay, betas: of AdamW. clip: maximal gradient norm; 0: none.
        accumulate: batches per step; every target token weighs the same, whatever its batch.
        autocast: None or "bfloat16"; routers stay in float32.
        expert_learning_rate, router_learning_rate: factors on the rate of expert weights and of
            routers.
        dropout, expert_dropout: rates of the model and of its experts; None: the model's own.
        teacher_weight: the teacher's share of the loss, where there is a teacher.
        label_smoothing: the share of every target that goes to all tokens alike, in training.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    accumulate: int = 1
    autocast: str | None = None
    expert_learning_rate: float = 1.0
    router_learning_rate: float = 1.0
    dropout: float | None = None
    expert_dropout: float | None = None
    teacher_weight: float = 0.25
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", _OPTIMIZERS), ("schedule", _SCHEDULES)):
            value = getattr(self, name)
            if value not in allowed:
                hint = did_you_mean(value, allowed)
                raise ConfigError(f"unknown {name} {value!r}", field=name, hint=hint)
        for name in ("learning_rate", "expert_learning_rate", "router_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be finite and > 0", field=name, found=value)
        for name, low in (("warmup", 0), ("accumulate", 1)):
            if getattr(self, name) < low:
                found = getattr(self, name)
                raise ConfigError(f"{name} is at least {low}", field=name, found=found)
        for name in ("dropout", "expert_dropout", "teacher_weight", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} lies in [0, 1]", field=name, found=value)
        if self.autocast not in (None, "bfloat16"):
            raise ConfigError("autocast is None or 'bfloat16'", field="autocast")

    def with_changes(self, **changes: Any) -> TrainingRecipe:
        """A copy with fields changed. Raises ConfigError for an unknown field."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"a training recipe has no {name!r}", field=name, hint=hint)
        return replace(self, **changes)


_OPTIMIZERS = ("adamw", "adafactor")
_SCHEDULES = ("constant", "linear", "inverse_sqrt", "t5")

RECIPES: dict[str, TrainingRecipe] = {
    # Switch Transformers, section 2, as its authors' code has it: Adafactor and T5's schedule
    # (1910.10683, section 3.1.2), 1 / sqrt(max(step, 10,000)), which begins at 0.01; no dropout.
    "pretrain": TrainingRecipe("adafactor", 1e-2, "t5", warmup=10_000, dropout=0.0),
    # Section 2.4 and table 4: constant 1e-3, dropout 0.1, and 0.4 within experts.
    "finetune": TrainingRecipe("adafactor", 1e-3, dropout=0.1, expert_dropout=0.4),
    # Sparse Upcycling (2212.05055): a fresh optimizer, the dense run's last rate goes on.
    "upcycle": TrainingRecipe("adafactor", 1e-3, "inverse_sqrt", warmup=1_000),
    # Section 4.2: a dense student of a Switch teacher, 0.25 teacher and 0.75 labels.
    "distill": TrainingRecipe("adafactor", 1e-3, "inverse_sqrt", warmup=1_000, dropout=0.0),
    # Small models on small text.
    "small": TrainingRecipe("adamw", 1e-3, "constant", warmup=30),
}


def recipe(name: str) -> TrainingRecipe:
    """A recipe by name. Raises ConfigError naming the nearest."""
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise ConfigError(f"unknown training recipe {name!r}", field="recipe", hint=hint)
    return RECIPES[name]


def make_optimizer(model: nn.Module, settings: TrainingRecipe) -> Optimizer:
    """The optimizer of a recipe over a model's parameters; experts and routers may have rates of
    their own.
    """
    factors = {"experts": settings.expert_learning_rate}
    if settings.router_learning_rate != 1.0:  # else as runs of before have saved their optimizers
        factors["router"] = settings.router_learning_rate
    by_part: dict[str, list[nn.Parameter]] = {"rest": [], **{part: [] for part in factors}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in factors if f".{part}." in name), "rest")
            by_part[part].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": settings.learning_rate * factors.get(part, 1.0)}
        for part, parameters in by_part.items()
        if parameters
    ]
    if settings.optimizer == "adafactor":
        return Adafactor(groups, settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def make_schedule(optimizer: Optimizer, settings: TrainingRecipe, steps: int) -> LambdaLR:
    """The learning-rate schedule; call `.step()` after each optimizer step."""
    return LambdaLR(optimizer, rate_factor(settings, steps))


def rate_factor(settings: TrainingRecipe, steps: int) -> Callable[[int], float]:
    """The factor on the peak rate at a step (0 is the first)."""
    warmup = settings.warmup

    def factor(step: int) -> float:
        if step < warmup and settings.schedule != "t5":
            return (step + 1) / warmup
        if settings.schedule == "linear":
            return max(0.0, (steps - step) / max(1, steps - warmup))
        if settings.schedule in ("inverse_sqrt", "t5"):
            return math.sqrt(max(1, warmup) / max(1, warmup, step + 1))
        return 1.0

    return factor
