"""Virtual groups: fine-grained experts of which a token takes each slice exactly once
(2410.07524).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, expert_inits, slices_of
from moezoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@expert_inits.register("virtual_group")
class VirtualGroupInit(ExpertInit):
    """`shards` slices of the dense layer, `num_experts / shards` copies of each (NVIDIA,
    2410.07524, section 3.2).

    Copies with the same number share a router row across the slices, so a token's best
    `shards` experts are every slice once, and the layer computes what the dense one did.

    Args:
        shards: slices, and choices per token.
    """

    exact = True
    streams = True
    sums_slices = True

    def __init__(self, shards: int = 2) -> None:
        if shards < 1:
            raise ConfigError("shards must be at least 1", field="shards", found=shards)
        self.shards = shards

    def check(self, d_ff: int, num_experts: int) -> None:
        for name, value in (("d_ff", d_ff), ("num_experts", num_experts)):
            if value % self.shards:
                raise ConfigError(
                    f"virtual_group needs shards that divide {name} = {value}",
                    field="shards",
                    found=self.shards,
                )

    def expert_width(self, d_ff: int, num_experts: int) -> int:
        return d_ff // self.shards

    def choices(self, num_experts: int) -> int | None:
        return self.shards

    def router_rows(self, num_experts: int) -> list[int]:
        return [index % (num_experts // self.shards) for index in range(num_experts)]

    def part(self, index: int, num_experts: int) -> tuple[int, int]:
        return index // (num_experts // self.shards), self.shards

    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        return slices_of(dense[0], *self.part(index, num_experts))
