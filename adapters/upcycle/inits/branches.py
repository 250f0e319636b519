"""Branch-Train-MiX: the experts are the feed-forward networks of several models (2403.07816)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, expert_inits

if TYPE_CHECKING:
    from torch import Tensor


@expert_inits.register("branches")
class BranchesInit(ExpertInit):
    """Expert e is the layer of branch e modulo the number of branches (Branch-Train-MiX,
    2403.07816, section 3.2); whatever is not an expert is averaged over the branches.

    N equal branches are `copy`.
    """

    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        branch = dense[index % len(dense)]
        return {name: matrix.clone() for name, matrix in branch.items()}
