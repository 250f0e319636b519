"""The router losses of a whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moezoo.assemble import make_losses
from moezoo.config import SwitchConfig
from moezoo.layer import MoE
from moezoo.records import Routing


class ModelLosses(nn.Module):
    """Each configured router loss as the mean over sparse layers, computed per layer, never pooled.

    Pooling layers before the product f * P would hide a collapse: two layers that use one expert
    each would look balanced. The mean keeps a coefficient's meaning independent of depth.
    """

    def __init__(self, config: SwitchConfig, stacks: Sequence[nn.Module]) -> None:
        super().__init__()
        layers = [m for stack in stacks for m in stack.modules() if isinstance(m, MoE)]
        made = make_losses(config, layers[0].router) if layers else {}
        self.losses = nn.ModuleDict({name: loss for name, (loss, _) in made.items()})
        self.coefficients = {name: coefficient for name, (_, coefficient) in made.items()}

    def forward(self, routing: Sequence[Routing]) -> dict[str, Tensor]:
        """Unweighted scalars by name; empty without sparse layers."""
        if not routing:
            return {}
        return {
            name: torch.stack([loss(layer) for layer in routing]).mean()
            for name, loss in self.losses.items()
        }

    def weighted(self, losses: dict[str, Tensor]) -> Tensor | None:
        """Sum of coefficient * loss, or None when there is none."""
        total: Tensor | None = None
        for name, value in losses.items():
            coefficient = self.coefficients[name]
            if coefficient:
                total = coefficient * value if total is None else total + coefficient * value
        return total
