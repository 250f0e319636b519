"""Top-2 routing with a choice about the second expert, as in GShard."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moezoo.functional.assign import best_experts, given_experts, pairs_of
from moezoo.functional.gates import gate, gate_probs
from moezoo.functional.varying import with_kept
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_number, check_one_of
from moezoo.routers.switch import check_sizes, classifier


@registry.register("gshard")
class GShardRouter(Router):
    """Send tokens to their two best experts, perhaps only to the best (GShard, 2006.16668, alg. 1).

    g1 and g2 are the two highest probabilities, divided by their sum before anything is dropped.
    The first pair is always proposed; the second one by `second`. All first choices come before all
    second ones. With one expert there is no second choice.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        second: "all"; "none"; "threshold" for g2 > threshold (Mesh TensorFlow); or "random": with
            probability min(1, 2 g2) in training (GShard's), always in evaluation.
        threshold: for second="threshold".
        bias: give the classifier a bias.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        second: Literal["all", "none", "threshold", "random"] = "random",
        threshold: float = 0.2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_one_of("second", second, ("all", "none", "threshold", "random"))
        check_number("threshold", threshold, at_least=0.0)
        self.d_model, self.num_experts = d_model, num_experts
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.second, self.threshold = second, threshold
        self.deterministic = second != "random"

    @property
    def choices(self) -> int:
        return min(2, self.num_experts)

    def expert_rows(self, num_tokens: int) -> float:
        return 1.0 if self.second == "none" else float(self.choices)

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = gate(self.classifier, tokens.x)
        probs_TE = gate_probs(logits_TE)
        number = self.choices
        expert_TK = given_experts(given, number) if given else best_experts(probs_TE, number)
        weight_TK = probs_TE.gather(1, expert_TK)
        if self.choices == 2:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        pairs = pairs_of(expert_TK, weight_TK, self.num_experts, tokens)
        if self.choices == 2 and self.second != "all":
            first_T = torch.ones_like(pairs.kept[: tokens.num_tokens])
            pairs = with_kept(pairs, torch.cat([first_T, self._takes_second(weight_TK[:, 1])]))
        if given is not None:  # after the draw, so that what is drawn next is what it would be
            pairs = pairs_of(expert_TK, weight_TK, self.num_experts, tokens, given)
        return Routing(pairs, logits=logits_TE, probs=probs_TE, real=tokens.real)

    def _takes_second(self, weight_T: Tensor) -> Tensor:
        """Whether each token (T,) is offered to its second expert."""
        weight_T = weight_T.detach()
        if self.second == "threshold":
            return weight_T > self.threshold
        if self.second == "random" and self.training:
            return torch.rand_like(weight_T) < 2.0 * weight_T
        return torch.full_like(weight_T, self.second == "random", dtype=torch.bool)
