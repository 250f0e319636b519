"""Expert choice: every expert takes its best tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.functional.assign import weighed
from moezoo.functional.gates import gate
from moezoo.functional.top_tokens import best_tokens, fair_share, fair_shares
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_number
from moezoo.routers.switch import check_sizes, classifier


@registry.register("expert_choice")
class ExpertChoiceRouter(Router):
    """Let every expert take its C most probable tokens of each group (2202.09368, eq. 1-2).

    C = ceil(factor * S / E) for S real tokens, so `factor` is the mean number of experts per token;
    a token may get several experts or none. Weights are the softmax over experts. Pairs come expert
    by expert, best token first; ties go to the earlier token.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        factor: capacity factor, the paper's c.
        eval_factor: the same in evaluation; None: as in training.
        bias: give the classifier a bias.
    """

    causal = False
    owns_capacity = True
    batch_invariant = False
    default_losses = {"load_balance": 0.0, "z": 0.0}  # balanced by construction

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        factor: float = 2.0,
        eval_factor: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_number("factor", factor, above=0.0)
        if eval_factor is not None:
            check_number("eval_factor", eval_factor, above=0.0)
        self.d_model, self.num_experts = d_model, num_experts
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.factor = float(factor)
        self.eval_factor = self.factor if eval_factor is None else float(eval_factor)

    @property
    def choices(self) -> int:
        return 0

    def expert_rows(self, num_tokens: int) -> float:
        return min(self.factor, float(self.num_experts))

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = gate(self.classifier, tokens.x)
        probs_TE = logits_TE.softmax(dim=-1)
        if given is None:
            pairs = self._chosen(probs_TE, tokens)
        else:
            pairs = weighed(given, probs_TE[given.token, given.expert])
        return Routing(pairs, logits=logits_TE, probs=probs_TE, real=tokens.real)

    def _chosen(self, probs_TE: Tensor, tokens: Tokens) -> Assignment:
        factor = self.factor if self.training else self.eval_factor
        groups, size = tokens.num_groups, tokens.group_size
        score_TE = probs_TE.detach()
        if tokens.real is not None:
            score_TE = torch.where(tokens.real[:, None], score_TE, -1.0)
        score_GES = score_TE.view(groups, size, self.num_experts).transpose(1, 2)
        slots = fair_share(factor, size, self.num_experts)
        start_G11 = torch.arange(groups, device=score_TE.device)[:, None, None] * size
        token_N = (best_tokens(score_GES.contiguous(), slots) + start_G11).reshape(-1)
        expert_E = torch.arange(self.num_experts, device=score_TE.device)
        expert_N = expert_E[:, None].expand(groups, -1, slots).reshape(-1)
        kept_N = torch.ones_like(token_N, dtype=torch.bool)
        weight_N = probs_TE[token_N, expert_N]
        if tokens.real is not None:
            # Only the real tokens of a group count, so that padding changes nothing.
            count_G = tokens.real.view(groups, size).sum(1)
            share_G11 = fair_shares(factor, count_G, self.num_experts)[:, None, None]
            rank_C = torch.arange(slots, device=score_TE.device)
            kept_N = (rank_C < share_G11).expand(groups, self.num_experts, slots).reshape(-1)
            weight_N = torch.where(kept_N, weight_N, 0.0)
        return Assignment(
            token=token_N,
            expert=expert_N,
            weight=weight_N,
            kept=kept_N,
            num_tokens=tokens.num_tokens,
            num_experts=self.num_experts,
            group_size=size,
        )
