"""One shared dense network with a low-rank difference per expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.component import Component
from moezoo.errors import ConfigError
from moezoo.experts.base import Experts, registry
from moezoo.experts.feed_forward import FeedForward
from moezoo.functional.drawn import normal_
from moezoo.ops.grouped_linear import grouped_linear


class LowRank(Component):
    """x -> scale * B_e A_e x for rows sorted by expert (LoRA, arXiv 2106.09685, eq. 3).

    Args:
        num_experts, inputs, outputs, rank: a is (E, R, inputs), b (E, outputs, R).
        scale: alpha / rank.
    """

    def __init__(
        self, num_experts: int, inputs: int, outputs: int, rank: int, *, scale: float
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(num_experts, rank, inputs))
        self.b = nn.Parameter(torch.empty(num_experts, outputs, rank))
        self.scale = scale
        self.reset_own()

    def reset_own(self) -> None:
        normal_(self.a, std=self.a.shape[-1] ** -0.5)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """(N, inputs), counts (E,) -> (N, outputs), zero in unused rows."""
        return self.scale * grouped_linear(grouped_linear(x, self.a, counts), self.b, counts)


@registry.register("lora")
class LoraExperts(Experts):
    """FFN_e has weights W + (alpha / rank) B_e A_e with one W for all (LoRA, 2106.09685, eq. 3).

    B starts at zero, so all experts start as the shared network: an upcycled dense layer that costs
    E * rank * (D + F) parameters per matrix instead of E * D * F (MixLoRA, arXiv 2404.15159).

    Args:
        d_model, d_ff, num_experts: sizes; `base` is a `FeedForward`.
        rank, alpha: of the difference; alpha None: equal to the rank, a scale of 1.
        activation, dropout: see `FeedForward`.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        rank: int = 8,
        alpha: float | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                wanted = "a whole number >= 1"
                raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))
        self.d_model, self.num_experts = d_model, num_experts
        self.base = FeedForward(d_model, d_ff, activation=activation, dropout=dropout)
        scale = 1.0 if alpha is None else alpha / rank
        for name in self._names:
            inputs, outputs = (d_ff, d_model) if name == "wo" else (d_model, d_ff)
            delta = LowRank(num_experts, inputs, outputs, rank, scale=scale)
            self.add_module(f"{name}_delta", delta)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("wi_0", "wi_1", "wo") if self.base.gated else ("wi", "wo")

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        def difference(name: str, x: Tensor) -> Tensor:
            delta: Tensor = self.get_submodule(f"{name}_delta")(x, counts)
            return delta

        out: Tensor = self.base(slots, difference=difference)  # x (W + scale B_e A_e)^T in each map
        owned_N = torch.arange(slots.shape[0], device=slots.device) < counts.sum()
        return torch.where(owned_N[:, None], out, 0.0)
