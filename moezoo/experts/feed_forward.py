"""One feed-forward network: what a single expert of a mixed or shared kind is made of."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moezoo.component import Component
from moezoo.errors import ConfigError
from moezoo.functional.activations import activation as activation_of
from moezoo.functional.drawn import DrawnLinear, FanIn

Difference = Callable[[str, Tensor], Tensor]


class FeedForward(Component):
    """y = fn(x wi^T) wo^T, or (fn(x wi_0^T) * (x wi_1^T)) wo^T, without biases.

    Weights start as those of `StackedExperts`: truncated normals of standard deviation
    1 / sqrt(fan-in), which is D for wi and F for wo.

    Args:
        d_model, d_ff: widths; wi is (F, D), wo (D, F).
        activation: see `moezoo.functional.activations`.
        dropout: on the hidden units, in training.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                wanted = "a whole number >= 1"
                raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))
        if not 0.0 <= dropout <= 1.0:
            raise ConfigError("dropout lies in [0, 1]", field="dropout", found=dropout)
        self.d_model, self.d_ff = d_model, d_ff
        self.function, self.gated = activation_of(activation)
        if self.gated:
            self.wi_0 = DrawnLinear(d_model, d_ff, FanIn())
            self.wi_1 = DrawnLinear(d_model, d_ff, FanIn())
        else:
            self.wi = DrawnLinear(d_model, d_ff, FanIn())
        self.wo = DrawnLinear(d_ff, d_model, FanIn())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, difference: Difference | None = None) -> Tensor:
        """(..., D) -> (..., D); `difference(name, x)` is added to what map `name` makes of x."""

        def linear(name: str, x: Tensor) -> Tensor:
            y: Tensor = self.get_submodule(name)(x)
            return y if difference is None else y + difference(name, x)

        if self.gated:
            hidden = self.function(linear("wi_0", x)) * linear("wi_1", x)
        else:
            hidden = self.function(linear("wi", x))
        return linear("wo", self.dropout(hidden))
