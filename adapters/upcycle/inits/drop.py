"""Drop-Upcycling: re-initialise a share of the hidden units of each copy (2502.19261)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, check_share, expert_inits
from moezoo.adapters.upcycle.keyed import keyed_generator

if TYPE_CHECKING:
    from torch import Tensor


@expert_inits.register("drop")
class DropInit(ExpertInit):
    """Each expert re-draws a share of its hidden units (Drop-Upcycling, 2502.19261, section 3.2).

    One set of units per expert, the same in all its matrices; new weights are normal with the mean
    and deviation of those they replace.

    Args:
        rate: share of the hidden units; 0 is `copy`.
    """

    def __init__(self, rate: float = 0.5) -> None:
        check_share("rate", rate, below_one=True)
        self.rate = rate
        self.exact = rate == 0

    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        import torch

        layer = dense[0]
        width = layer["wo"].shape[1]
        count = round(self.rate * width)
        unit_key = f"{key}.experts.{index}.units"
        units = torch.randperm(width, generator=keyed_generator(seed, unit_key), device="cpu")[
            :count
        ]
        made: dict[str, Tensor] = {}
        for name, matrix in layer.items():
            made[name] = matrix.clone()
            if not count:
                continue
            axis = 1 if name == "wo" else 0
            old = matrix.index_select(axis, units).float()
            generator = keyed_generator(seed, f"{key}.experts.{index}.{name}")
            spread = (old - old.mean()).square().mean().sqrt()
            new = old.mean() + spread * torch.randn(old.shape, generator=generator, device="cpu")
            made[name].index_copy_(axis, units, new.to(matrix.dtype))
        return made
