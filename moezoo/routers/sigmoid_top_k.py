"""Sigmoid gating with a balancing bias instead of a loss, as in DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.errors import ConfigError, ShapeError
from moezoo.functional.assign import best_experts, given_experts, pairs_of
from moezoo.functional.collective import summed_over_ranks
from moezoo.functional.gates import gate
from moezoo.functional.queues import pairs_per_expert
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_number, check_one_of, check_whole
from moezoo.routers.switch import check_sizes, classifier


@registry.register("sigmoid_top_k")
class SigmoidTopKRouter(Router):
    """Choose by sigmoid(x W) + b, weigh by sigmoid(x W) (DeepSeek-V3, 2412.19437, eq. 12-16).

    b is a buffer, not a parameter: it changes who is chosen, never a chosen expert's weight. After
    each optimizer step, `adapt` (or `rebalance` with counts of your own) lowers it for overloaded
    experts and raises it for idle ones (2408.15664, algorithm 1). Ties go to the lowest expert.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        k: experts per token.
        score: "sigmoid", or "sqrt_softplus" (DeepSeek-V4).
        normalize: divide a token's k scores by their sum; without effect for k = 1.
        scale: multiplies the weights after that.
        bias_rate: the step u of the balancing bias.
        groups, groups_per_token: split the experts into so many groups of equal size and choose
            within the best few only; a group scores the sum of its two best experts.
        bias: give the classifier an ordinary bias, trained by gradient.
    """

    default_losses = {"load_balance": 0.0001, "z": 0.0}  # balanced by the bias (section 4.2)

    expert_bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        score: Literal["sigmoid", "sqrt_softplus"] = "sigmoid",
        normalize: bool = True,
        scale: float = 1.0,
        bias_rate: float = 0.001,
        groups: int = 1,
        groups_per_token: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts, k)
        check_one_of("score", score, ("sigmoid", "sqrt_softplus"))
        check_number("scale", scale, above=0.0)
        check_number("bias_rate", bias_rate, at_least=0.0)
        _check_groups(groups, groups_per_token, num_experts, k)
        self.d_model, self.num_experts, self.k = d_model, num_experts, k
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.register_buffer("expert_bias", torch.empty(num_experts))
        self.score, self.normalize, self.scale = score, normalize, scale
        self.bias_rate, self.groups, self.groups_per_token = bias_rate, groups, groups_per_token
        self.reset_own()

    def reset_own(self) -> None:
        self.expert_bias.zero_()

    @property
    def choices(self) -> int:
        return self.k

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = gate(self.classifier, tokens.x)
        log_score_TE = _log_score(logits_TE, self.score)
        choice_TE = log_score_TE.detach().exp() + self.expert_bias.to(logits_TE.dtype)
        if self.groups > self.groups_per_token:
            choice_TE = _within_best_groups(choice_TE, self.groups, self.groups_per_token)
        expert_TK = given_experts(given, self.k) if given else best_experts(choice_TE, self.k)
        chosen_TK = log_score_TE.gather(1, expert_TK)
        # softmax(log s) is s / sum s, and stays defined where every s underflows.
        normal = self.normalize and self.k > 1
        weight_TK = chosen_TK.softmax(dim=-1) if normal else chosen_TK.exp()
        pairs = pairs_of(expert_TK, self.scale * weight_TK, self.num_experts, tokens, given)
        probs_TE = log_score_TE.softmax(dim=-1)
        return Routing(pairs, logits=logits_TE, probs=probs_TE, real=tokens.real)

    @torch.no_grad()
    def rebalance(self, counts: Tensor) -> None:
        """Move the bias by `bias_rate` towards balance: down where counts (E,) exceed their mean.

        Raises ShapeError for counts of another shape.
        """
        if counts.shape != self.expert_bias.shape:
            wanted, found = tuple(self.expert_bias.shape), tuple(counts.shape)
            raise ShapeError("counts do not fit the experts", expected=wanted, found=found)
        load_E = counts.to(self.expert_bias.device, self.expert_bias.dtype)
        self.expert_bias += self.bias_rate * torch.sign(load_E.mean() - load_E)

    def adapt(self, routings: Sequence[Routing]) -> None:
        """`rebalance` with the proposed pairs of these routings, over all ranks."""
        counts_E = torch.zeros_like(self.expert_bias, dtype=torch.int64)
        for routing in routings:
            assert isinstance(routing.offered, Assignment)
            counts_E = counts_E + pairs_per_expert(routing.offered)
        self.rebalance(summed_over_ranks(counts_E))


def _log_score(logits_TE: Tensor, score: str) -> Tensor:
    if score == "sigmoid":
        return F.logsigmoid(logits_TE)
    # log softplus(z) is z itself far below zero, where softplus underflows.
    low_TE = logits_TE < -30.0
    log_TE = F.softplus(torch.where(low_TE, 0.0, logits_TE)).log()
    return 0.5 * torch.where(low_TE, logits_TE, log_TE)


def _within_best_groups(choice_TE: Tensor, groups: int, groups_per_token: int) -> Tensor:
    """The same scores, -infinity outside each token's best groups (by their two best experts)."""
    num_tokens, num_experts = choice_TE.shape
    size = num_experts // groups
    choice_TGS = choice_TE.view(num_tokens, groups, size)
    group_TG = choice_TGS.topk(min(2, size), dim=-1).values.sum(-1)
    open_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    open_TG.scatter_(1, best_experts(group_TG, groups_per_token), True)
    closed_TGS = torch.where(open_TG[:, :, None], choice_TGS, float("-inf"))
    return closed_TGS.view(num_tokens, num_experts)


def _check_groups(groups: int, groups_per_token: int, num_experts: int, k: int) -> None:
    check_whole("groups", groups, 1, num_experts)
    check_whole("groups_per_token", groups_per_token, 1, groups)
    if num_experts % groups:
        reason = f"{num_experts} experts do not split into {groups} groups of equal size"
        raise ConfigError(reason, field="groups", hint="Choose a divisor of num_experts.")
    if k > groups_per_token * (num_experts // groups):
        reason = f"k = {k} experts do not fit into {groups_per_token} of {groups} groups"
        raise ConfigError(reason, field="groups_per_token", hint="Raise it, or lower k.")
