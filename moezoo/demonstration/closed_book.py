"""The closed-book part of the demo: how many facts a dense T5 and its experts can store."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moezoo.adapters.upcycle.live import upcycle_model
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.building import build
from moezoo.config import SwitchConfig
from moezoo.cost import cost
from moezoo.demonstration.effort import USUAL
from moezoo.reporting.trial import Price
from moezoo.training.facts import VOCAB_SIZE, Facts
from moezoo.training.loop import StepRecord, TrainingState, fit, start
from moezoo.training.recipes import TrainingRecipe, recipe

POINTS = 16
OnStep = Callable[[StepRecord], None]
# A rate that stays constant misleads: the end of a run then measures the rate's noise.
SETTINGS = TrainingRecipe(learning_rate=8e-3, schedule="linear", warmup=30)
# The gate starts at 1 and the choice is sharp from the first step, so that an expert sees the same
# tokens long enough to become their expert; and the router moves slowly, for the same reason.
UPCYCLING: dict[str, Any] = {
    "layers": "all",
    "router": {"name": "switch", "weight": "unit"},
    "router_init": "normal:0.02",
}


@dataclass(frozen=True)
class Moment:
    """Recall (share of facts) after `step` steps and `seconds` of the processor's time, in which
    measuring is not counted.
    """

    step: int
    seconds: float
    recall: float


@dataclass(frozen=True)
class Learner:
    """One model's curve; parameters in all, and those that a token uses."""

    name: str
    seed: int
    parameters: int
    active: int
    curve: tuple[Moment, ...]

    @property
    def recall(self) -> float:
        """At the end."""
        return self.curve[-1].recall

    @property
    def price(self) -> Price:
        end = self.curve[-1]
        return Price(self.parameters, self.active, end.seconds / max(end.step, 1))

    def reaches(self, recall: float) -> Moment | None:
        """The first moment with at least this recall, between two measurements by a straight
        line; None when it never comes.
        """
        for before, after in zip(self.curve, self.curve[1:], strict=False):
            if after.recall >= recall:
                rise = after.recall - before.recall
                share = (recall - before.recall) / rise if rise > 0 else 1.0
                share = min(max(share, 0.0), 1.0)
                step = round(before.step + share * (after.step - before.step))
                seconds = before.seconds + share * (after.seconds - before.seconds)
                return Moment(step, seconds, recall)
        return None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def small_t5(width: int = 32) -> SwitchConfig:
    """One encoder and one decoder layer, d_ff twice the width: 24 thousand parameters at 32."""
    return SwitchConfig(
        vocab_size=VOCAB_SIZE,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_heads=width // 8,
        num_layers=1,
        dropout_rate=0.0,
    )


class Book:
    """The comparison over seeds: for each, a dense T5 trained for `steps` on `count` facts, then
    trained on for as long, as it is and upcycled to `experts` experts in every layer.

    Attributes: dense, switch: their curves after the common start, by seed.
    """

    def __init__(self, count: int, experts: int, steps: int = USUAL["steps"]) -> None:
        self.count, self.experts, self.steps = count, experts, steps
        self.dense: list[Learner] = []
        self.switch: list[Learner] = []

    def rehearsed(self, steps: int = 12) -> tuple[float, float]:
        """The seconds of the clock that a step of the dense model and one of the Switch model
        take here and now, from a few steps of both.
        """
        facts, taken = self._facts(0), []
        model = build(small_t5(), seed=0)
        for each in (model, self._upcycled(model, 0)):
            fit(start(each, SETTINGS, steps=2), facts, SETTINGS, steps=2)  # the first are slow
            began = time.monotonic()
            fit(start(each, SETTINGS, steps=steps), facts, SETTINGS, steps=steps)
            taken.append((time.monotonic() - began) / steps)
        return taken[0], taken[1]

    def trainings(self, seed: int) -> Iterator[tuple[str, Callable[[OnStep], Learner]]]:
        """The parts of a seed in order, each to be called with what sees its steps."""
        facts, steps = self._facts(seed), self.steps
        parent = build(small_t5(), seed=seed)
        yield "parent", lambda on_step: learn(parent, facts, "parent", steps=steps, on_step=on_step)
        switch = self._upcycled(parent, seed)

        def further(side: list[Learner], name: str, model: nn.Module, **settings: float) -> Any:
            def run(on_step: OnStep) -> Learner:
                chosen = SETTINGS.with_changes(**settings)
                side.append(
                    learn(model, facts, name, steps=steps, skip=steps, settings=chosen,
                          on_step=on_step)
                )  # fmt: skip
                return side[-1]

            return run

        yield "dense", further(self.dense, "dense", parent)
        slow = {"router_learning_rate": recipe("upcycle").router_learning_rate}
        yield "switch", further(self.switch, "switch", switch, **slow)

    def table(self) -> list[tuple[str, str, str]]:
        return comparison(self.dense, self.switch)

    def price(self) -> Price:
        return price(self.dense, self.switch)

    def verdict(self) -> str:
        return verdict(self.dense, self.switch)

    def to_dict(self) -> dict[str, Any]:
        sides = {"dense": self.dense, "switch": self.switch}
        curves = {name: [one.to_dict() for one in side] for name, side in sides.items()}
        return {"facts": self.count, "steps": self.steps, "experts": self.experts, **curves}

    def _facts(self, seed: int) -> Facts:
        return Facts(self.count, batch_size=min(512, self.count), seed=seed)

    def _upcycled(self, model: nn.Module, seed: int) -> nn.Module:
        return upcycle_model(model, Recipe(num_experts=self.experts, seed=seed, **UPCYCLING))


def learn(
    model: nn.Module,
    facts: Facts,
    name: str,
    *,
    steps: int,
    skip: int = 0,
    settings: TrainingRecipe = SETTINGS,
    on_step: OnStep | None = None,
) -> Learner:
    """Train a model on facts, and measure its recall at the start and `POINTS` times on the way.

    Args:
        skip: batches that were used before.
    """
    began, measuring, curve = time.process_time(), 0.0, []

    def measure(step: int) -> None:
        nonlocal measuring
        now = time.process_time()
        curve.append(Moment(step, now - began - measuring, facts.recall(model)))
        measuring += time.process_time() - now

    def after(state: TrainingState, record: StepRecord) -> None:
        if on_step is not None:
            on_step(record)
        if state.step % max(1, steps // POINTS) == 0 or state.step == steps:
            measure(state.step)

    measure(0)
    fit(
        start(model, settings, steps=steps),
        lambda step: facts(skip + step),
        settings,
        steps=steps,
        on_step=after,
    )
    config = model.config
    assert isinstance(config, SwitchConfig)
    size = cost(config)
    return Learner(name, facts.seed, size.parameters, size.active, tuple(curve))


def comparison(dense: Sequence[Learner], switch: Sequence[Learner]) -> list[tuple[str, str, str]]:
    """Both sides over the seeds as a table of text, one row a fact."""

    def both(title: str, show: Callable[[Sequence[Learner]], str]) -> tuple[str, str, str]:
        return (title, show(dense), show(switch))

    goals = [learner.recall for learner in dense]

    def to_dense_end(side: Sequence[Learner], field: str) -> str:
        reached = [one.reaches(goal) for one, goal in zip(side, goals, strict=True)]
        values = [float(getattr(moment, field)) for moment in reached if moment is not None]
        return spread(values, ".0f" if field == "step" else ".1f") if values else "never"

    return [
        both("recall before", lambda side: spread([s.curve[0].recall for s in side], ".3f")),
        both("recall after", lambda side: spread([s.recall for s in side], ".3f")),
        both("steps to dense's end", lambda side: to_dense_end(side, "step")),
        both("processor seconds to it", lambda side: to_dense_end(side, "seconds")),
        both("processor seconds in all",
             lambda side: spread([s.curve[-1].seconds for s in side], ".1f")),
        both("parameters in memory", lambda side: f"{side[0].parameters:,}"),
        both("parameters used by a token", lambda side: f"{side[0].active:,}"),
    ]  # fmt: skip


def price(dense: Sequence[Learner], switch: Sequence[Learner]) -> Price:
    """What the Switch side asks for in multiples of the dense one; of seconds the mean."""
    each = [s.price / d.price for d, s in zip(dense, switch, strict=True)]
    seconds = sum(one.seconds for one in each) / len(each)
    return dataclasses.replace(each[0], seconds=seconds)


def verdict(dense: Sequence[Learner], switch: Sequence[Learner]) -> str:
    """What was seen, whichever side is ahead, and what it costs, in a few sentences."""
    ends = [(sum(s.recall for s in side) / len(side)) for side in (dense, switch)]
    seeds = f"{len(dense)} seeds" if len(dense) > 1 else "one seed"
    asks = price(dense, switch)
    costs = (
        f" It holds {asks.parameters:.1f} times the parameters, all of them in memory; a token "
        f"uses {asks.active:.2f} times as many, and a step takes {asks.seconds:.2f} times the "
        "processor's time."
    )
    if ends[1] <= ends[0]:
        said = f"After the same steps dense recalls {ends[0]:.0%}, switch {ends[1]:.0%} ({seeds})."
        return said + costs.replace(" It", " Switch", 1)
    moments = [s.reaches(d.recall) for d, s in zip(dense, switch, strict=True)]
    steps, seconds = (
        sum(
            getattr(d.curve[-1], field) / max(getattr(m, field), 1e-9)
            for d, m in zip(dense, moments, strict=True)
            if m is not None
        )
        / max(sum(m is not None for m in moments), 1)
        for field in ("step", "seconds")
    )
    return (
        f"From the same start and the same steps, switch recalls {ends[1]:.0%} of the facts and "
        f"dense {ends[0]:.0%} ({seeds}). It passes dense's end in {steps:.1f} times fewer steps "
        f"and {seconds:.1f} times fewer processor seconds.{costs}"
    )


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range where there is more than one value."""
    mean = format(sum(values) / len(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"
