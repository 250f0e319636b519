"""Cosine routing in a low dimension, as in X-MoE."""

from __future__ import annotations

import torch
from torch import nn

from moezoo.functional.assign import token_choice
from moezoo.functional.drawn import DrawnLinear, orthogonal_
from moezoo.functional.gates import gate, gate_logits, gate_weight
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import accept_scalar, check_number, check_whole
from moezoo.routers.soft import unit_rows
from moezoo.routers.switch import check_sizes


@registry.register("cosine")
class CosineRouter(Router):
    """Score by the cosine of projected token and expert embedding (X-MoE, 2204.09179, eq. 5-7).

    logits = cos(P x, e_i) / temperature, then top-k of their softmax; the length of x does not
    matter. The temperature is learned and kept at 0.01 or above. Ties go to the lowest expert.

    Args:
        d_model, num_experts: sizes of the layer.
        k: experts per token.
        low_dim: the dimension of the comparison; None: E / 2 as in the paper, at least 2 and at
            most D.
        temperature: where the learned temperature starts.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        k: int = 1,
        low_dim: int | None = None,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts, k)
        check_number("temperature", temperature, at_least=0.01)
        if low_dim is None:
            low_dim = min(max(num_experts // 2, 2), d_model)
        check_whole("low_dim", low_dim, 1)
        self.d_model, self.num_experts, self.k = d_model, num_experts, k
        self.projection = nn.Linear(d_model, low_dim, bias=False)
        self.classifier = DrawnLinear(low_dim, num_experts, orthogonal_)
        self.first_temperature = float(temperature)
        self.temperature = nn.Parameter(torch.empty(1))
        accept_scalar(self, "temperature")
        self.reset_own()

    def reset_own(self) -> None:
        nn.init.constant_(self.temperature, self.first_temperature)

    @property
    def choices(self) -> int:
        return self.k

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        low_TR = unit_rows(gate(self.projection, tokens.x))
        embedding_ER = unit_rows(gate_weight(self.classifier, low_TR))
        temperature = self.temperature.to(low_TR.dtype).clamp(min=0.01)
        logits_TE = gate_logits(low_TR, embedding_ER) / temperature
        probs_TE = logits_TE.softmax(dim=-1)
        pairs = token_choice(probs_TE, probs_TE, self.k, tokens, given)
        return Routing(pairs, logits=logits_TE, probs=probs_TE, real=tokens.real)
