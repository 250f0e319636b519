"""Noisy top-k gating, the router of the first large mixture-of-experts models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moezoo.functional.assign import best_experts, given_experts, pairs_of
from moezoo.functional.drawn import DrawnLinear
from moezoo.functional.gates import gate
from moezoo.functional.losses import squared_variation
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.switch import check_sizes, classifier


@registry.register("noisy_top_k")
class NoisyTopKRouter(Router):
    """Send tokens to their k experts of highest noisy score (Shazeer et al., 1701.06538, eq. 3-5).

    H = x W_g + N(0, 1) * softplus(x W_n); a token's weights are the softmax over its k chosen H
    (over all experts for k = 1, where it would be constant). The noise is drawn in training only.
    The router gives the load loss of appendix A, CV^2 of the smooth expected load.

    Args:
        d_model, num_experts: sizes of the classifier and of the noise gate, both (E, D).
        k: experts per token.
        bias: give the classifier a bias.
    """

    deterministic = False
    own_losses = frozenset({"load"})
    default_losses = {"importance": 0.1, "load": 0.1, "z": 0.0}  # appendix A, table 6

    def __init__(self, d_model: int, num_experts: int, *, k: int = 2, bias: bool = False) -> None:
        super().__init__()
        check_sizes(d_model, num_experts, k)
        self.d_model, self.num_experts, self.k = d_model, num_experts, k
        self.classifier = classifier(d_model, num_experts, bias=bias)
        # As in the paper: equal noise for everybody at first.
        self.noise = DrawnLinear(d_model, num_experts, nn.init.zeros_)

    @property
    def choices(self) -> int:
        return self.k

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        clean_TE = gate(self.classifier, tokens.x)
        scale_TE = F.softplus(gate(self.noise, tokens.x))
        noisy_TE = clean_TE
        if self.training:
            noisy_TE = clean_TE + torch.randn_like(clean_TE) * scale_TE
        ranked_TK = best_experts(noisy_TE, min(self.k + 1, self.num_experts))
        expert_TK = given_experts(given, self.k) if given else ranked_TK[:, : self.k]
        if self.k > 1:
            weight_TK = noisy_TE.gather(1, expert_TK).softmax(dim=-1)
        else:
            weight_TK = noisy_TE.softmax(dim=-1).gather(1, expert_TK)
        load_TE = self._expected_load(clean_TE, noisy_TE, scale_TE, ranked_TK)
        if tokens.real is not None:
            load_TE = torch.where(tokens.real[:, None], load_TE, 0.0)
        return Routing(
            pairs_of(expert_TK, weight_TK, self.num_experts, tokens, given),
            logits=clean_TE,
            probs=clean_TE.softmax(dim=-1),
            losses={"load": squared_variation(load_TE.sum(0))},
            real=tokens.real,
        )

    def _expected_load(
        self, clean_TE: Tensor, noisy_TE: Tensor, scale_TE: Tensor, ranked_TK: Tensor
    ) -> Tensor:
        """P(x, i) (T, E): the chance that expert i is chosen if its noise is drawn anew (eq. 9).

        `ranked_TK` (T, k + 1) are the experts of highest noisy score.
        """
        if self.k == self.num_experts:
            return torch.ones_like(clean_TE)
        top_TK = noisy_TE.gather(1, ranked_TK)
        last_in_T1, first_out_T1 = top_TK[:, -2:-1], top_TK[:, -1:]
        # The k-th highest score of the others: one further down for those who are in themselves.
        bar_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
        scale_TE = scale_TE.clamp(min=torch.finfo(scale_TE.dtype).eps ** 3)
        # Past 40 deviations the chance is 0 or 1 in every dtype; infinite gaps (by scores of
        # -infinity) and quotients, whose gradients would be NaN, are never formed.
        far_TE = 40.0 * scale_TE.detach()
        never_TE = clean_TE == float("-inf")
        gap_TE = torch.where(never_TE, 0.0, clean_TE) - bar_TE
        gap_TE = torch.minimum(torch.maximum(gap_TE, -far_TE), far_TE)
        chance_TE = torch.special.ndtr(gap_TE / scale_TE)
        return torch.where(never_TE, 0.0, chance_TE)
