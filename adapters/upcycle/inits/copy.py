"""Sparse Upcycling: every expert is a copy of the dense layer (2212.05055)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, expert_inits

if TYPE_CHECKING:
    from torch import Tensor


@expert_inits.register("copy")
class CopyInit(ExpertInit):
    """Every expert is the dense layer (Sparse Upcycling, 2212.05055)."""

    exact = True
    streams = True

    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        return {name: matrix.clone() for name, matrix in dense[0].items()}
