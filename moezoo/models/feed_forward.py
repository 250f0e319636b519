"""The dense MLP of T5, plain or gated."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.functional.activations import activation
from moezoo.functional.dropout import Dropout, relu_dropout
from moezoo.models.linear import Linear
from moezoo.ops.observed import is_plain


class DenseMLP(nn.Module):
    """y = dropout(fn(x wi^T)) wo^T, or fn(x wi_0^T) * (x wi_1^T) in the middle (GLU, 2002.05202).

    Args:
        d_model, d_ff: widths.
        activation_name: see `moezoo.functional.activations`.
        dropout: on the hidden units, in training.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation_name: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.function, self.gated = activation(activation_name)
        if self.gated:
            self.wi_0 = Linear(d_model, d_ff)
            self.wi_1 = Linear(d_model, d_ff)
        else:
            self.wi = Linear(d_model, d_ff)
        self.wo = Linear(d_ff, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.gated:
            hidden = self.dropout(self.function(self.wi_0(x)) * self.wi_1(x))
        elif self.function is F.relu and is_plain(self.dropout, Dropout):
            hidden = relu_dropout(self.wi(x), self.dropout.p, training=self.dropout.training)
        else:
            hidden = self.dropout(self.function(self.wi(x)))
        y: Tensor = self.wo(hidden)
        return y
