"""What a layout costs, in its parts: memory of a rank, bytes on the wire, seconds of a step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from moezoo.errors import ConfigError
from moezoo.layouts.shapes import Parameters, on_rank


class _Sum:
    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(getattr(self, entry.name) for entry in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Memory(_Sum):
    """Bytes of a rank at their most.

    experts, dense: weights, gradients and state of the optimizer. copies: gathered weights in
    half precision and the gradients that are being reduced. activations: kept for backward.
    peak: more around the cross entropy, or of the block that is computed again, whichever is more.
    exchange: rows on their way. context: of CUDA and NCCL.
    """

    experts: int
    dense: int
    copies: int
    activations: int
    peak: int
    exchange: int
    context: int


@dataclass(frozen=True)
class Wire(_Sum):
    """Bytes that a rank sends per step.

    rows: tokens to experts and back. dense, experts: weights that are gathered, gradients that are
    reduced.
    """

    rows: int
    dense: int
    experts: int


@dataclass(frozen=True)
class Time:
    """Seconds of a step: gathers run beside the products, the rest after them."""

    compute: float
    gathers: float
    rows: float
    optimizer: float

    @property
    def total(self) -> float:
        """The longer of compute and gathers, and the rest."""
        return max(self.compute, self.gathers) + self.rows + self.optimizer


@dataclass(frozen=True)
class Layout:
    """A model over GPUs: experts over `ep` ranks, each copy cut again over the `dp` ranks that
    hold other tokens; dense weights over `dense_over` ranks, and replicated beyond.

    memory: bytes of rank 0, which holds the most; limit: what a GPU has for them. wire, time: of
    a step. expert_parameters: of each rank. reason: why it does not fit, or how it compares.
    """

    name: str
    gpus: int
    ep: int
    dense_over: int
    memory: Memory
    limit: int
    wire: Wire
    time: Time
    expert_parameters: int
    reason: str = ""
    parameters: Parameters = field(repr=False, compare=False, kw_only=True)

    @property
    def dp(self) -> int:
        """How many ranks hold the same experts."""
        return self.gpus // self.ep

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    def dense_parameters(self, rank: int = 0) -> int:
        """How many numbers of all that is no expert a rank holds. Raises ConfigError."""
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < self.gpus:
            wanted = f"0 to {self.gpus - 1}"
            raise ConfigError("no such rank", field="rank", expected=wanted, found=repr(rank))
        return on_rank(self.parameters.dense, self.dense_over, rank % self.dense_over)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        facts: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("name", "gpus", "ep", "dp", "dense_over", "fits", "reason", "limit")
        }
        facts["expert_parameters"] = self.expert_parameters
        facts["dense_parameters"] = self.dense_parameters(0)
        for name in ("memory", "wire", "time"):
            part = getattr(self, name)
            facts[name] = {**asdict(part), "total": part.total}
        return facts
