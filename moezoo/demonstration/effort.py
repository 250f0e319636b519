"""How many steps and seeds of the demo fit the minutes, on this machine and beside its other work.

Forecasts are in seconds of the clock, in which a busy machine is slow; what is compared in the
end are seconds of the processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

USUAL = {"steps": 600, "text_steps": 150, "further": 75}
LEAST = 1 / 3  # of the usual steps: with fewer there would be nothing to see
_TEXT_STEP = 2.5  # a step on text takes about so many times a dense one on facts
_REST = 1000  # the vocabulary, two commands, evaluation and the picture, in dense steps on facts


@dataclass(frozen=True)
class Pace:
    """Seconds of the clock that a step on facts takes, of the dense and of the Switch model."""

    dense: float
    switch: float


@dataclass(frozen=True)
class Effort:
    """Steps of each training on facts; on text of the dense model, and of both further.

    share: of the usual steps, where they were not asked for.
    """

    steps: int
    text_steps: int
    further: int
    share: float = 1.0

    def seed(self, pace: Pace) -> float:
        """The seconds of a seed of the facts: a parent, and both models trained on."""
        return self.steps * (2 * pace.dense + pace.switch)

    def rest(self, pace: Pace) -> float:
        """The seconds of all that comes after the facts."""
        return ((self.text_steps + 3 * self.further) * _TEXT_STEP + _REST) * pace.dense

    def seeds(self, pace: Pace, seconds: float, most: int) -> int:
        """How many seeds fit into `seconds`; one at least."""
        return min(most, max(1, int((seconds - self.rest(pace)) / self.seed(pace))))


def effort(asked: Mapping[str, int | None], pace: Pace, seconds: float) -> Effort:
    """The steps that fit into `seconds` with one seed: the usual ones, or `LEAST` of them at least.

    Args:
        asked: numbers of steps by the names of `USUAL`; None leaves the choice, others are taken.
    """

    def at(share: float) -> Effort:
        return Effort(**{name: asked[name] or max(1, round(share * USUAL[name])) for name in USUAL},
                      share=share)  # fmt: skip

    usual, fixed = at(1.0), _REST * pace.dense
    whole = usual.seed(pace) + usual.rest(pace)
    if whole <= seconds or None not in asked.values():
        return usual
    return at(max(LEAST, (seconds - fixed) / (whole - fixed)))
