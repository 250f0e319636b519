"""Top-k routing, as in Mixtral, OLMoE, Qwen and gpt-oss."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.assign import best_experts, given_experts, pairs_of
from moezoo.functional.gates import gate, gate_probs, jittered
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.switch import check_jitter, check_sizes, classifier


@registry.register("top_k")
class TopKRouter(Router):
    """Send every token to its k most probable experts (Shazeer et al., 1701.06538, eq. 3-5).

    Pairs are in rank-major order: all first choices in token order, then all second ones. Ties go
    to the lowest expert.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        k: experts per token.
        softmax: "before" the choice, over all experts (Mixtral, OLMoE), or "after" it, over the
            chosen logits alone (gpt-oss; needs k > 1, or the gate would be constant).
        normalize: divide a token's k weights by their sum: "none" (OLMoE, Switch), "before" the
            capacity policy (Mixtral, Qwen3), or "after" it, over the kept pairs. Without effect for
            k = 1, where it would make every weight 1 and the gate could not learn.
        bias, jitter: as for `switch`.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 2,
        softmax: Literal["before", "after"] = "before",
        normalize: Literal["none", "before", "after"] = "before",
        bias: bool = False,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts, k)
        check_jitter(jitter)
        if softmax not in ("before", "after"):
            raise ConfigError("unknown softmax", field="softmax", expected="'before' or 'after'")
        if normalize not in ("none", "before", "after"):
            allowed = "'none', 'before' or 'after'"
            raise ConfigError("unknown normalize", field="normalize", expected=allowed)
        if softmax == "after" and k == 1:
            reason = "softmax='after' over a single choice is constant: the gate could not learn"
            raise ConfigError(reason, field="softmax", hint="Use softmax='before', or k >= 2.")
        self.d_model, self.num_experts, self.k = d_model, num_experts, k
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.softmax, self.normalize, self.jitter = softmax, normalize, jitter
        self.deterministic = jitter == 0.0

    @property
    def choices(self) -> int:
        return self.k

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        x_TD = jittered(tokens.x, self.jitter) if self.training and self.jitter else tokens.x
        logits_TE = gate(self.classifier, x_TD)
        probs_TE = gate_probs(logits_TE)
        expert_TK = given_experts(given, self.k) if given else best_experts(logits_TE, self.k)
        if self.softmax == "after":
            weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
        else:
            weight_TK = probs_TE.gather(1, expert_TK)
        if self.normalize == "before" and self.k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        assignment = pairs_of(expert_TK, weight_TK, self.num_experts, tokens, given)
        return Routing(assignment, logits=logits_TE, probs=probs_TE, real=tokens.real)

    def reweigh(self, admitted: Assignment) -> Assignment:
        if self.normalize != "after" or self.k == 1:
            return admitted
        return replace(admitted, weight=normalized_over_kept(admitted))


def normalized_over_kept(admitted: Assignment) -> Tensor:
    """Weights (N,) divided by the sum over their token's kept pairs; pairs not kept get 0."""
    weight_N = torch.where(admitted.kept, admitted.weight, admitted.weight.new_zeros(()))
    total_T = weight_N.new_zeros(admitted.num_tokens).index_add(0, admitted.token, weight_N)
    tiny = torch.finfo(weight_N.dtype).tiny
    return weight_N / total_T.clamp(min=tiny)[admitted.token]
