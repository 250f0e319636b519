"""BASE layers: an exact balanced assignment in training (`base.py` holds the base class)."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.functional.assign import best_experts, given_experts, pairs_of
from moezoo.functional.gates import gate
from moezoo.functional.matching import balanced_assignment
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.switch import check_sizes, classifier


@registry.register("base")
class BaseLayersRouter(Router):
    """Give every expert equally many tokens at the greatest total score (BASE, 2103.16716, eq. 2).

    In training each group of T real tokens is assigned so that the sum of x W over its pairs is the
    greatest among all assignments with T / E tokens per expert (rounded down or up where E does not
    divide T); in evaluation every token takes its best expert. The weight is sigmoid(x W).

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        bias: give the classifier a bias.
    """

    causal = False
    owns_capacity = True
    batch_invariant = False
    default_losses = {"load_balance": 0.0, "z": 0.0}  # balanced by construction

    def __init__(self, d_model: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        self.d_model, self.num_experts = d_model, num_experts
        self.classifier = classifier(d_model, num_experts, bias=bias)

    @property
    def waits(self) -> bool:
        return self.training  # for the scores to match

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = gate(self.classifier, tokens.x)
        if given is not None:
            expert_T1 = given_experts(given, 1)
        elif self.training:
            expert_T1 = _balanced(logits_TE.detach(), tokens)
        else:
            expert_T1 = best_experts(logits_TE, 1)
        weight_T1 = logits_TE.gather(1, expert_T1).sigmoid()
        pairs = pairs_of(expert_T1, weight_T1, self.num_experts, tokens, given)
        probs_TE = logits_TE.softmax(dim=-1)
        return Routing(pairs, logits=logits_TE, probs=probs_TE, real=tokens.real)


def _balanced(logits_TE: Tensor, tokens: Tokens) -> Tensor:
    """The optimal expert (T, 1) of every real token, group by group; 0 for padding.

    Runs on the CPU: a linear assignment has no parallel form worth having at these sizes.
    """
    score_TE = logits_TE.cpu()
    expert_T = torch.zeros(tokens.num_tokens, dtype=torch.int64, device="cpu")
    real_T = torch.ones_like(expert_T, dtype=torch.bool)
    if tokens.real is not None:
        real_T = tokens.real.cpu()
    for group in range(tokens.num_groups):
        start = group * tokens.group_size
        member_N = real_T[start : start + tokens.group_size].nonzero()[:, 0] + start
        expert_T[member_N] = balanced_assignment(score_TE[member_N])
    return expert_T[:, None].to(logits_TE.device)
