"""Sinkhorn routing: choose from a balanced plan in training, by the scores in evaluation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moezoo.functional.assign import token_choice
from moezoo.functional.gates import gate
from moezoo.functional.sinkhorn import column_potentials
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_number, check_one_of, check_whole
from moezoo.routers.switch import check_sizes, classifier


@registry.register("sinkhorn")
class SinkhornRouter(Router):
    """Choose from the Sinkhorn-normalised scores (S-BASE of Clark et al., 2202.01169, section 3.1).

    In training a token's experts are the best of exp(logits / temperature + u + v), whose rows sum
    to 1 and whose columns sum to T / E per group; in evaluation they are the best logits. Weights
    are the softmax (or sigmoid) of the plain logits. Ties go to the lowest expert.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        k: experts per token.
        iterations: Sinkhorn steps; a fixed number, so that nothing waits for the device.
        temperature: of the plan; lower is nearer to the linear assignment of `base`.
        gate: "softmax" or "sigmoid".
        bias: give the classifier a bias.
    """

    causal = False
    batch_invariant = False
    default_losses = {"load_balance": 0.0, "z": 0.0}  # balanced by the plan

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 1,
        iterations: int = 16,
        temperature: float = 1.0,
        gate: Literal["softmax", "sigmoid"] = "softmax",
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts, k)
        check_whole("iterations", iterations, 1)
        check_number("temperature", temperature, above=0.0)
        check_one_of("gate", gate, ("softmax", "sigmoid"))
        self.d_model, self.num_experts, self.k = d_model, num_experts, k
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.iterations, self.temperature, self.gate = iterations, temperature, gate

    @property
    def choices(self) -> int:
        return self.k

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = gate(self.classifier, tokens.x)
        probs_TE = logits_TE.softmax(dim=-1)
        plans = self.training and given is None
        choice_TE = self._balanced(logits_TE.detach(), tokens) if plans else logits_TE
        gate_TE = logits_TE.sigmoid() if self.gate == "sigmoid" else probs_TE
        pairs = token_choice(choice_TE, gate_TE, self.k, tokens, given)
        return Routing(pairs, logits=logits_TE, probs=probs_TE, real=tokens.real)

    def _balanced(self, logits_TE: Tensor, tokens: Tokens) -> Tensor:
        """The plan's logarithm but for a constant per token, which changes no choice."""
        shape = (tokens.num_groups, tokens.group_size, self.num_experts)
        score_GSE = torch.nan_to_num(logits_TE).view(shape) / self.temperature
        real_GS = None if tokens.real is None else tokens.real.view(shape[:2])
        potential = column_potentials(score_GSE, real_GS, self.iterations)
        return (score_GSE + potential).view(-1, self.num_experts)
