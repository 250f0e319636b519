"""ReLU routing: gates that switch themselves off, as in ReMoE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.assign import weighed
from moezoo.functional.collective import summed_over_ranks
from moezoo.functional.gates import gate
from moezoo.functional.losses import masked_mean
from moezoo.functional.varying import varying_choice
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_number, check_whole
from moezoo.routers.switch import check_sizes, classifier


@registry.register("relu")
class ReLURouter(Router):
    """Weigh every expert by relu(x W); a zero gate is no expert (ReMoE, arXiv 2412.14711, eq. 5).

    Continuous in x, since a pair appears with weight 0. The router gives the loss `l1` (eq. 6-8):
    the mean over tokens of coefficient * sum_e f_e relu(x W)_e, where f_e = E / (k T) * (tokens of
    expert e) balances the load; each `adapt` multiplies the coefficient by alpha^sign(target -
    sparsity), so give the loss itself the weight 1.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        k: mean number of experts per token aimed at: the target sparsity is 1 - k / E.
        coefficient, alpha: the first coefficient of the loss and its adaptation factor.
        balance: weigh experts by their load f_e; False: by 1.
        max_choices: see `moezoo.functional.varying.varying_choice`.
        bias: give the classifier a bias.
    """

    has_probs = False
    own_losses = frozenset({"l1"})
    default_losses = {"l1": 1.0, "z": 0.0}

    coefficient: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: float = 1.0,
        coefficient: float = 1e-8,
        alpha: float = 1.2,
        balance: bool = True,
        max_choices: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_number("k", k, above=0.0)
        if k > num_experts:
            raise ConfigError("k exceeds num_experts", field="k", expected=num_experts, found=k)
        check_number("coefficient", coefficient, above=0.0)
        check_number("alpha", alpha, at_least=1.0)
        if max_choices is not None:
            check_whole("max_choices", max_choices, 1, num_experts)
        self.d_model, self.num_experts, self.k = d_model, num_experts, float(k)
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.alpha, self.balance, self.max_choices = alpha, balance, max_choices
        self.first_coefficient = float(coefficient)
        self.register_buffer("coefficient", torch.empty(()))
        self.reset_own()

    def reset_own(self) -> None:
        self.coefficient.fill_(self.first_coefficient)

    @property
    def choices(self) -> int:
        return self.max_choices or 0

    def expert_rows(self, num_tokens: int) -> float:
        return self.k

    @property
    def target_sparsity(self) -> float:
        """The share of zero gates aimed at."""
        return 1.0 - self.k / self.num_experts

    @property
    def waits(self) -> bool:
        return self.max_choices is None  # how many pairs there are

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = gate(self.classifier, tokens.x)
        gate_TE = logits_TE.relu()
        if given is None:
            pairs = varying_choice(gate_TE.detach() > 0, gate_TE, tokens, self.max_choices)
        else:
            pairs = weighed(given, gate_TE[given.token, given.expert])
        l1 = self._l1(gate_TE, tokens.real)
        return Routing(pairs, logits=logits_TE, losses={"l1": l1}, real=tokens.real)

    def _l1(self, gate_TE: Tensor, real: Tensor | None) -> Tensor:
        weighed_TE = gate_TE
        if self.balance:
            active_TE = (gate_TE.detach() > 0).to(gate_TE.dtype)
            share_E = _masked_share(active_TE, real)
            weighed_TE = gate_TE * (share_E * (self.num_experts / self.k))
        # A copy: `adapt` changes the buffer in place, perhaps before backward has read it.
        return self.coefficient.clone() * masked_mean(weighed_TE.sum(-1), real)

    @torch.no_grad()
    def adapt(self, routings: Sequence[Routing]) -> None:
        """Raise or lower the loss coefficient towards the target sparsity, over all ranks."""
        counted = torch.zeros(2, dtype=torch.float64, device=self.coefficient.device)
        for routing in routings:
            assert routing.logits is not None and isinstance(routing.offered, Assignment)
            real = routing.real
            num_real = routing.logits.shape[0] if real is None else real.sum()
            counted[0] += routing.offered.kept.sum()
            counted[1] += num_real * self.num_experts
        active, possible = summed_over_ranks(counted)
        sparsity = 1.0 - active / possible.clamp(min=1.0)
        step = torch.where(possible > 0, torch.sign(self.target_sparsity - sparsity), 0.0)
        self.coefficient *= self.alpha ** step.to(self.coefficient.dtype)


def _masked_share(active_TE: Tensor, real: Tensor | None) -> Tensor:
    """The share (E,) of real tokens that use each expert; 0 when there are none."""
    if real is None:
        return active_TE.sum(0) / max(active_TE.shape[0], 1)
    return torch.where(real[:, None], active_TE, 0.0).sum(0) / real.sum().clamp(min=1)
