"""The shared branch: an expert that every token takes, besides the routed ones."""

from __future__ import annotations

from torch import Tensor, nn

from moezoo.component import Component
from moezoo.experts.feed_forward import FeedForward
from moezoo.functional.gates import gate


class SharedExpert(Component):
    """y = FFN(x), or sigmoid(x w_g) FFN(x): the shared expert of DeepSeekMoE (2401.06066, eq. 9).

    Pass it as `MoE(..., shared=SharedExpert(...))`. The gate is Qwen2-MoE's; it computes in
    float32. Several shared experts are one of their summed width.

    Args:
        d_model, d_ff: widths of the network.
        activation, dropout: see `FeedForward`.
        gated: multiply by a learned gate between 0 and 1 per token.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.expert = FeedForward(d_model, d_ff, activation=activation, dropout=dropout)
        self.gate = nn.Linear(d_model, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y: Tensor = self.expert(x)
        if self.gate is None:
            return y
        return y * gate(self.gate, x).sigmoid().to(y.dtype)
