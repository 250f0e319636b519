"""E equal feed-forward networks as stacked parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.errors import ConfigError
from moezoo.experts.base import Experts, registry
from moezoo.functional.activations import activation as activation_of
from moezoo.functional.composed_mlp import composed_mlp
from moezoo.functional.drawn import FanIn
from moezoo.functional.dropout import Dropout
from moezoo.functional.fused_experts import fused_experts, worth_fusing
from moezoo.functional.grouped_mlp import grouped_mlp, lone_mlp
from moezoo.functional.shards import local_of
from moezoo.ops.observed import is_plain
from moezoo.records import Assignment


@registry.register("stacked")
class StackedExperts(Experts):
    """FFN_e(x) = fn(x wi_e^T) wo_e^T, or gated with wi_0 and wi_1 (Switch Transformers, section
    2.1); with biases where they are asked for.

    Args:
        d_model, d_ff, num_experts: sizes; wi is (E, F, D), wo (E, D, F).
        bias: each matrix has one, which starts at 0: wi_bias is (E, F), wo_bias (E, D).
        activation: see `moezoo.functional.activations`.
        dropout: expert dropout, on the hidden units in training (section 2.4).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("num_experts", num_experts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                wanted = "a whole number >= 1"
                raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))
        if not isinstance(bias, bool):
            found = repr(bias)
            raise ConfigError("bad bias", field="bias", expected="True or False", found=found)
        if not 0.0 <= dropout <= 1.0:
            raise ConfigError("dropout lies in [0, 1]", field="dropout", found=dropout)
        self.d_model, self.d_ff, self.num_experts = d_model, d_ff, num_experts
        self.activation = activation
        self.function, self.gated = activation_of(activation)
        self.dropout = Dropout(dropout)
        inner, outer = (num_experts, d_ff, d_model), (num_experts, d_model, d_ff)
        if self.gated:
            self.wi_0 = nn.Parameter(torch.empty(inner))
            self.wi_1 = nn.Parameter(torch.empty(inner))
        else:
            self.wi = nn.Parameter(torch.empty(inner))
        self.wo = nn.Parameter(torch.empty(outer))
        self.bias = bias
        for name in self.names if bias else ():
            width = d_model if name == "wo" else d_ff
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_experts, width)))
        self.initial = FanIn()
        self.reset_own()

    def reset_own(self) -> None:
        """Truncated normals of standard deviation 1 / sqrt(fan-in), as in `FeedForward`; in a model
        times its scale; biases are 0.
        """
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                self.initial(parameter)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the matrices, in the order of their use."""
        return ("wi_0", "wi_1", "wo") if self.gated else ("wi", "wo")

    def biases(self) -> tuple[Tensor, ...]:
        """One for each of `names`, or none."""
        return tuple(local_of(getattr(self, f"{name}_bias")) for name in self.names if self.bias)

    def expert_sizes(self) -> tuple[int, tuple[int, ...]]:
        each = sum(p.numel() for p in self.parameters()) // self.num_experts
        return 0, (each,) * self.num_experts

    @property
    def takes_weights(self) -> bool:
        # Another's `forward` may know nothing of them.
        return type(self).forward is StackedExperts.forward and "forward" not in vars(self)

    def forward(self, slots: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
        if self.dispatcher is None:
            return self._run(slots, counts, weights)
        if weights is None:
            return self.dispatcher(slots, counts, self._run)
        # They travel as one more column, in the dtype that the hidden units are weighed in.
        joined = torch.cat([slots, weights[:, None].to(slots.dtype)], 1)
        return self.dispatcher(joined, counts, self._run_joined)

    def _run_joined(self, joined: Tensor, counts: Tensor) -> Tensor:
        return self._run(joined[:, :-1], counts, joined[:, -1])

    def _run(self, slots: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
        """The experts of this rank: all, or those that a dispatcher has for it."""
        inner, outer = self._inner(), local_of(self.wo)
        plain = is_plain(self.dropout, Dropout)
        p = self.dropout.p if plain and self.dropout.training else 0.0
        if weights is not None or not plain:
            drop = p if plain else self.dropout
            matrices = (*inner, outer)
            function, biases = self.function, self.biases()
            return composed_mlp(
                slots, counts, matrices, function, drop, gate_N=weights, biases=biases
            )
        return grouped_mlp(
            slots, counts, inner, outer, function=self.function, p=p, biases=self.biases()
        )

    def alone(self, row: Tensor, expert: int) -> Tensor:
        if type(row) is not Tensor or row.dtype != self.wo.dtype or not self._may_be_passed_by():
            return super().alone(row, expert)
        inner, biases = self._inner(), self.biases()
        return lone_mlp(row, expert, inner, self.wo, function=self.function, biases=biases)

    def fused(self, x_TD: Tensor, assignment: Assignment) -> Tensor | None:
        if self.is_spread:
            return None
        inner, function = self._inner(), self.function
        if self.bias or not worth_fusing(x_TD, assignment, (*inner, self.wo), function):
            return None
        if not self._may_be_passed_by():
            return None
        return fused_experts(x_TD, assignment, inner, self.wo, function=function)

    def _may_be_passed_by(self) -> bool:
        dropout = self.dropout
        if self.is_spread or (dropout.training and dropout.p > 0.0):
            return False
        return is_plain(self, StackedExperts) and is_plain(dropout, Dropout)

    def _inner(self) -> tuple[Tensor, ...]:
        weights = (self.wi_0, self.wi_1) if self.gated else (self.wi,)
        return tuple(map(local_of, weights))

    def extra_repr(self) -> str:
        said = f"{self.num_experts} x ({self.d_model} -> {self.d_ff}), {self.activation}"
        return f"{said}, bias" if self.bias else said
