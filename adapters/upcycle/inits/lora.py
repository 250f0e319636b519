"""Copies that differ by a matrix of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, check_share, expert_inits
from moezoo.adapters.upcycle.keyed import keyed_generator
from moezoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@expert_inits.register("lora")
class LoraInit(ExpertInit):
    """Every expert is the dense layer plus a random matrix of low rank, B A (LoRA, 2106.09685).

    Args:
        rank: of the difference. scale: its deviation over that of the matrix; 0 is `copy`.
    """

    def __init__(self, rank: int = 8, scale: float = 1e-2) -> None:
        if rank < 1:
            raise ConfigError("rank must be at least 1", field="rank", found=rank)
        check_share("scale", scale)
        self.rank, self.scale = rank, scale
        self.exact = scale == 0

    def check(self, d_ff: int, num_experts: int) -> None:
        if self.rank > d_ff:
            raise ConfigError(
                "rank exceeds the hidden width",
                field="rank",
                expected=f"<= {d_ff}",
                found=self.rank,
            )

    def expert(
        self, dense: Sequence[Matrices], index: int, num_experts: int, *, key: str, seed: int
    ) -> dict[str, Tensor]:
        import torch

        made: dict[str, Tensor] = {}
        for name, matrix in dense[0].items():
            wide = matrix.float()
            generator = keyed_generator(seed, f"{key}.experts.{index}.{name}")
            left = torch.randn(matrix.shape[0], self.rank, generator=generator, device="cpu")
            right = torch.randn(self.rank, matrix.shape[1], generator=generator, device="cpu")
            spread = (wide - wide.mean()).square().mean().sqrt()
            delta = left @ right * (self.scale * spread / self.rank**0.5)
            made[name] = (wide + delta).to(matrix.dtype)
        return made
