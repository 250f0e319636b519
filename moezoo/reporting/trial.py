"""What was measured of one model while it was trained on: plain values, JSON both ways."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Price:
    """What a model asks for: parameters in memory, those of them that a token uses, and the
    processor's seconds of a training step; or, as a quotient, each in multiples of another's.
    """

    parameters: float
    active: float
    seconds: float

    def __truediv__(self, other: Price) -> Price:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Price(*(mine / theirs if theirs else 0.0 for mine, theirs in pairs))


@dataclass
class Trial:
    """One model's part of a comparison.

    before, after: held-out loss in nats per target token. steps, seconds, tokens: of its training.
    seconds are the processor's, whatever else it does, and without measuring. parameters, active:
    all, and those that a token uses. dropped: share of token-expert pairs that were not computed
    in training. training, held_out: loss by step. loads: share of tokens by expert, for each
    sparse layer.
    """

    name: str
    before: float
    after: float
    steps: int
    seconds: float
    tokens: int
    parameters: int
    active: int
    dropped: float = 0.0
    training: Curve = field(default_factory=list)
    held_out: Curve = field(default_factory=list)
    loads: dict[str, list[float]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def price(self) -> Price:
        return Price(self.parameters, self.active, self.seconds / max(self.steps, 1))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


HEADER = ("", "dense", "switch")


def rows(dense: Trial, switch: Trial) -> list[tuple[str, str, str]]:
    """The comparison as a table of text, one row a fact."""

    def pair(title: str, show: Any) -> tuple[str, str, str]:
        return (title, show(dense), show(switch))

    return [
        pair("held-out loss before, nats", lambda t: f"{t.before:.4f}"),
        pair("held-out loss after, nats", lambda t: f"{t.after:.4f}"),
        pair("change", lambda t: f"{t.after - t.before:+.4f}"),
        pair("steps", lambda t: f"{t.steps:,}"),
        pair("processor seconds", lambda t: f"{t.seconds:.1f}"),
        pair("tokens per processor second", lambda t: f"{t.tokens_per_second:,.0f}"),
        pair("parameters in memory", lambda t: f"{t.parameters:,}"),
        pair("parameters used by a token", lambda t: f"{t.active:,}"),
        pair("dropped in training", lambda t: f"{t.dropped:.2%}" if t.loads else "-"),
        pair("tokens of the busiest / idlest expert", _extremes),
    ]


def verdict(dense: Trial, switch: Trial) -> str:
    """Who ended lower on held-out text, in a sentence."""
    gap = dense.after - switch.after
    winner, loser = (switch, dense) if gap > 0 else (dense, switch)
    if abs(gap) < 0.0005:
        return f"After {dense.steps:,} steps both models stand at {dense.after:.3f} nats."
    return (
        f"After {dense.steps:,} steps each, {winner.name} is ahead by {abs(gap):.3f} nats "
        f"({winner.after:.3f} against {loser.after:.3f}); it ran at "
        f"{winner.tokens_per_second / max(loser.tokens_per_second, 1e-9):.2f} times the speed."
    )


def balance(trial: Trial) -> str:
    """How evenly the tokens are spread over the experts of the layer that does it worst, in a
    sentence; nothing for a dense model.
    """
    if not trial.loads:
        return ""
    name, shares = max(trial.loads.items(), key=lambda item: max(item[1]))
    equal = 1 / len(shares)
    idle = sum(share < equal / 10 for share in shares)
    return (
        f"The least even layer is {name}: of {len(shares)} experts the busiest takes "
        f"{max(shares):.0%} of the tokens (an equal share is {equal:.1%}) and {idle} take less "
        "than a tenth of theirs; what an expert does not see it cannot learn."
    )


def _extremes(trial: Trial) -> str:
    shares = [share for layer in trial.loads.values() for share in layer]
    return f"{max(shares):.1%} / {min(shares):.1%}" if shares else "-"
