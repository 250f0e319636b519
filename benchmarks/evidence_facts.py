"""Facts learned by heart, for benchmarks/evidence.py: nothing but parameters can hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import nn

import moezoo
from benchmarks.evidence_tuning import Row, Trial
from benchmarks.reproductions import PUBLISHED, widen
from moezoo.adapters.upcycle.folding import fold_factor, folded_config
from moezoo.config import SwitchConfig
from moezoo.demonstration.closed_book import Moment, learn, small_t5
from moezoo.training.facts import Facts
from moezoo.training.recipes import TrainingRecipe

COUNT = 8192
PARENT_STEPS, PARENT_RATE, STEPS = 1600, 8e-3, 800
RATES = (4e-3, 8e-3, 1.6e-2)
SETTINGS = TrainingRecipe(schedule="linear", warmup=30)
STAY_AFTER = 50  # steps after which we look whether tokens still go to their first expert
# Adafactor's rates are relative to the size of a parameter, which is about a quarter here.
SCALE = {"adamw": 1.0, "adafactor": 2.5}


class Book:
    """The task: `COUNT` random facts, as `moezoo demo` has them."""

    def key(self, trial: Trial, rate: float, seed: int) -> str:
        facts = {"rate": rate, "seed": seed, "facts": COUNT, **asdict(trial)}
        return json.dumps(facts, sort_keys=True)

    def rates(self, trial: Trial) -> tuple[float, ...]:
        scale = SCALE[trial.training.get("optimizer", "adamw")]
        return tuple(scale * rate for rate in RATES)

    def moments(self, row: Row) -> tuple[Moment, ...]:
        return tuple(Moment(**moment) for moment in row["curve"])

    def measure(self, trial: Trial, rate: float, seed: int) -> Row:
        facts = Facts(COUNT, seed=seed)
        model = _model(trial, seed)
        before = [] if trial.upcycle is None else _choices(model, facts)
        stayed: list[float] = []

        def after(record: Any) -> None:
            if before and record.step == STAY_AFTER:
                stayed.append(_stayed(before, _choices(model, facts)))

        learner = learn(
            model,
            facts,
            "",
            steps=trial.steps,
            skip=0 if trial.scratch is not None else PARENT_STEPS,
            settings=SETTINGS.with_changes(learning_rate=rate, **trial.training),
            on_step=after,
        )
        stay = stayed[0] if before else None
        return {"stayed": stay, "folded": _folded(model, facts), **learner.to_dict()}


def _model(trial: Trial, seed: int) -> nn.Module:
    if trial.scratch is not None:
        config = small_t5().replace(**PUBLISHED, **trial.scratch)
        model = moezoo.build(config, seed=seed)
        if trial.scratch:
            widen(model, trial.widen)
        return model
    parent = moezoo.build(small_t5(), seed=seed)
    parent.load_state_dict(_parent(seed))
    return parent if trial.upcycle is None else moezoo.upcycle(parent, **trial.upcycle, seed=seed)


@cache
def _parent(seed: int) -> dict[str, torch.Tensor]:
    """The weights of the dense model that all trials of a seed go on from."""
    model = moezoo.build(small_t5(), seed=seed)
    settings = SETTINGS.with_changes(learning_rate=PARENT_RATE)
    learn(model, Facts(COUNT, seed=seed), "parent", steps=PARENT_STEPS, settings=settings)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _choices(model: nn.Module, facts: Facts) -> list[torch.Tensor]:
    """The experts that the tokens of a batch go to, by sparse layer; empty for a dense model."""
    training = model.training
    routings = model.eval()(**facts(0)).routing
    model.train(training)
    return [routing.assignment.expert.clone() for routing in routings]


def _stayed(before: list[torch.Tensor], now: list[torch.Tensor]) -> float:
    """The share of choices that are the same, the least of all layers."""
    pairs = zip(before, now, strict=True)
    return min((float((a == b).float().mean()) for a, b in pairs), default=1.0)


def _folded(model: nn.Module, facts: Facts) -> float | None:
    """Recall of a model of unit weight in the layout of transformers' Switch (`export --fold`)."""
    config = model.config
    assert isinstance(config, SwitchConfig)
    if not isinstance(config.router, Mapping) or config.router.get("weight") != "unit":
        return None
    plain = moezoo.build(folded_config(config))
    state = model.state_dict()
    factors = {name: fold_factor(name, config.num_experts) for name in state}
    plain.load_state_dict({name: factors[name] * tensor for name, tensor in state.items()})
    return facts.recall(plain)
