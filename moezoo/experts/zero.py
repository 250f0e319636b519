"""Zero-computation experts beside real ones, as in MoE++."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.errors import ConfigError
from moezoo.experts.base import Experts, registry
from moezoo.functional.drawn import normal_
from moezoo.functional.gates import gate_logits


@registry.register("zero")
class ZeroExperts(Experts):
    """Real experts first, then experts that compute (almost) nothing (MoE++, 2410.07348, eq. 3-5).

    zero: y = 0, the token is skipped. copy: y = x. constant: y = a x + b v with [a, b] =
    softmax(W x) and a learned v. With equal gates they let easy tokens take less computation.

    Args:
        d_model, d_ff, num_experts: sizes; num_experts counts all kinds.
        experts: the container of the real experts, by name or spec, or an instance.
        zero, copy, constant: how many of each kind; None: one, as far as a real expert remains.
        activation, dropout: of the real experts.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        experts: object = "stacked",
        zero: int | None = None,
        copy: int | None = None,
        constant: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.d_model, self.num_experts = d_model, num_experts
        self.zero, self.copy, self.constant = _numbers(num_experts, zero, copy, constant)
        self.real = num_experts - self.zero - self.copy - self.constant
        self.experts = registry.build(
            experts,
            d_model=d_model,
            d_ff=d_ff,
            num_experts=self.real,
            activation=activation,
            dropout=dropout,
        )
        if self.experts.num_experts != self.real:
            raise ConfigError(
                "the real experts do not fill up num_experts",
                field="experts",
                expected=self.real,
                found=self.experts.num_experts,
            )
        self.row_wise = self.experts.row_wise
        if self.constant:
            self.value = nn.Parameter(torch.empty(self.constant, d_model))
            self.mixer = nn.Parameter(torch.empty(self.constant, 2, d_model))
            self.reset_own()

    def reset_own(self) -> None:
        if self.constant:
            normal_(self.value, std=self.d_model**-0.5)
            normal_(self.mixer, std=self.d_model**-0.5)

    def expert_sizes(self) -> tuple[int, tuple[int, ...]]:
        common, real = self.experts.expert_sizes()
        constants = (3 * self.d_model,) * self.constant
        return common, (*real, *(0,) * (self.zero + self.copy), *constants)

    @property
    def is_spread(self) -> bool:
        return self.experts.is_spread  # real ones alone travel

    @property
    def waits(self) -> bool:
        return self.experts.waits

    def forward(self, slots: Tensor, counts: Tensor) -> Tensor:
        out_ND: Tensor = self.experts(slots, counts[: self.real])  # zero past the real rows
        end_E = counts.cumsum(0)
        row_N = torch.arange(slots.shape[0], device=slots.device)
        expert_N = torch.searchsorted(end_E, row_N, right=True)  # E for unused rows
        first_copy = self.real + self.zero
        copies_N = (expert_N >= first_copy) & (expert_N < first_copy + self.copy)
        out_ND = out_ND + torch.where(copies_N[:, None], slots, 0.0)
        for index in range(self.constant):
            mine_N = expert_N == first_copy + self.copy + index
            out_ND = out_ND + torch.where(mine_N[:, None], self._constant(slots, index), 0.0)
        return out_ND

    def _constant(self, slots: Tensor, index: int) -> Tensor:
        """a x + b v for every row (N, D); the caller keeps the rows of this expert."""
        share_N2 = gate_logits(slots, self.mixer[index]).softmax(dim=-1).to(slots.dtype)
        mixed: Tensor = share_N2[:, :1] * slots + share_N2[:, 1:] * self.value[index]
        return mixed

    def extra_repr(self) -> str:
        return f"{self.real} real, {self.zero} zero, {self.copy} copy, {self.constant} constant"


def _numbers(num_experts: int, *wanted: int | None) -> tuple[int, int, int]:
    """How many zero, copy and constant experts, leaving at least one real one."""
    for name, number in zip(("zero", "copy", "constant"), wanted, strict=True):
        if number is not None and (isinstance(number, bool) or number < 0):
            raise ConfigError(f"{name} is a whole number >= 0", field=name, found=repr(number))
    free = num_experts - 1 - sum(number or 0 for number in wanted)
    if free < 0:
        hint = "Lower zero, copy or constant, or raise num_experts."
        reason = f"no real expert is left among {num_experts}"
        raise ConfigError(reason, field="num_experts", hint=hint)
    chosen = []
    for number in wanted:
        taken = min(free, 1) if number is None else 0
        chosen.append(taken if number is None else number)
        free -= taken
    return chosen[0], chosen[1], chosen[2]
