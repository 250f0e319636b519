"""Copies with relative noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, check_share, expert_inits
from moezoo.adapters.upcycle.keyed import keyed_generator

if TYPE_CHECKING:
    from torch import Tensor


@expert_inits.register("noise")
class NoiseInit(ExpertInit):
    """Every expert is the dense layer plus noise of its own, relative to each matrix's spread.

    Args:
        scale: standard deviation of the noise over that of the matrix; 0 is `copy`.
    """

    def __init__(self, scale: float = 1e-3) -> None:
        check_share("scale", scale)
        self.scale = scale
        self.exact = scale == 0

    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        import torch

        noisy: dict[str, Tensor] = {}
        for name, matrix in dense[0].items():
            wide = matrix.float()
            generator = keyed_generator(seed, f"{key}.experts.{index}.{name}")
            draws = torch.randn(matrix.shape, generator=generator, device="cpu")
            noisy[name] = (wide + draws * (self.scale * _spread(wide))).to(matrix.dtype)
        return noisy


def _spread(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mean()).square().mean().sqrt()
