"""MoEfication: the experts are slices of one feed-forward network (2110.01786)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, expert_inits, slices_of
from moezoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@expert_inits.register("split")
class SplitInit(ExpertInit):
    """Expert e is the e-th slice of the hidden units; all slices together are the dense layer
    (MoEfication, 2110.01786). No parameters are added. Exact while a token takes every slice.
    """

    exact = True
    streams = True
    sums_slices = True

    def check(self, d_ff: int, num_experts: int) -> None:
        if d_ff % num_experts:
            raise ConfigError(
                "split needs a number of experts that divides d_ff",
                field="num_experts",
                expected=f"a divisor of {d_ff}",
                found=num_experts,
            )

    def expert_width(self, d_ff: int, num_experts: int) -> int:
        return d_ff // num_experts

    def choices(self, num_experts: int) -> int | None:
        return num_experts

    def part(self, index: int, num_experts: int) -> tuple[int, int]:
        return index, num_experts

    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        return slices_of(dense[0], *self.part(index, num_experts))
