"""What a verification found: five levels, one human line, JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LEVELS = {
    1: "static: every tensor accounted for",
    2: "bytes: what should be copied is",
    3: "layers: MoE(x) = FFN(x)",
    4: "model: logits agree",
    5: "routers: load and entropy",
}


@dataclass(frozen=True)
class LevelResult:
    """One level: whether it passed, in a few words, with its numbers."""

    level: int
    passed: bool
    summary: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """The results of the levels that were run, in order."""

    target: str
    source: str
    results: tuple[LevelResult, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def line(self) -> str:
        """The verdict for a human reader, what failed first."""
        held = "; ".join(result.summary for result in self.results if result.passed)
        failed = [r for r in self.results if not r.passed]
        if not failed:
            return f"verified: {held}"
        reasons = "; ".join(f"level {r.level} ({r.summary})" for r in failed)
        return f"NOT verified: {reasons} failed" + (f"; passed: {held}" if held else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "line": self.line,
            "target": self.target,
            "source": self.source,
            "levels": [
                {
                    "level": result.level,
                    "name": LEVELS[result.level],
                    "passed": result.passed,
                    "summary": result.summary,
                    **result.numbers,
                }
                for result in self.results
            ],
        }
