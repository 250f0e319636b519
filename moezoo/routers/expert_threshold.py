"""Expert threshold routing: expert choice made causal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.functional.assign import best_experts, weighed
from moezoo.functional.collective import num_ranks, summed_over_ranks
from moezoo.functional.gates import gate
from moezoo.functional.top_tokens import fair_share
from moezoo.functional.varying import varying_choice
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers.base import Router, registry
from moezoo.routers.checks import check_number, check_whole
from moezoo.routers.switch import check_sizes, classifier


@registry.register("expert_threshold")
class ExpertThresholdRouter(Router):
    """Send a token to every expert whose threshold its probability reaches (arXiv 2603.11535).

    Expert e takes token t iff p_e(t) >= q_e, where q_e is a moving average of the C-th largest p_e
    of a training step, C = factor * T / E: as many tokens as expert choice would take, but each
    decided by itself, in training too. Until the first `adapt` has set the thresholds, tokens take
    their ceil(factor) most probable experts.

    Args:
        d_model, num_experts: sizes of the classifier (E, D).
        factor: mean number of experts per token.
        decay: of the moving average; the first `adapt` sets the thresholds outright.
        max_choices: see `moezoo.functional.varying.varying_choice`.
        bias: give the classifier a bias.
    """

    default_losses = {"load_balance": 0.0, "z": 0.0}  # balanced by the thresholds

    threshold: Tensor
    num_updates: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        factor: float = 1.0,
        decay: float = 0.99,
        max_choices: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(d_model, num_experts)
        check_number("factor", factor, above=0.0)
        if not 0.0 <= decay < 1.0:
            raise ConfigError("decay lies in [0, 1)", field="decay", found=decay)
        if max_choices is not None:
            check_whole("max_choices", max_choices, 1, num_experts)
        self.d_model, self.num_experts = d_model, num_experts
        self.classifier = classifier(d_model, num_experts, bias=bias)
        self.factor, self.decay, self.max_choices = float(factor), decay, max_choices
        self.register_buffer("threshold", torch.empty(num_experts))
        self.register_buffer("num_updates", torch.empty((), dtype=torch.int64))
        self.reset_own()

    def reset_own(self) -> None:
        self.threshold.fill_(1.0 / self.num_experts)
        self.num_updates.zero_()

    @property
    def choices(self) -> int:
        return self.max_choices or 0

    def expert_rows(self, num_tokens: int) -> float:
        return min(self.factor, float(self.num_experts))

    @property
    def waits(self) -> bool:
        return self.max_choices is None  # how many pairs there are

    def forward(self, tokens: Tokens, given: Assignment | None = None) -> Routing:
        logits_TE = gate(self.classifier, tokens.x)
        probs_TE = logits_TE.softmax(dim=-1)
        if given is None:
            chosen_TE = self._reached(probs_TE.detach())
            pairs = varying_choice(chosen_TE, probs_TE, tokens, self.max_choices)
        else:
            pairs = weighed(given, probs_TE[given.token, given.expert])
        return Routing(pairs, logits=logits_TE, probs=probs_TE, real=tokens.real)

    def _reached(self, probs_TE: Tensor) -> Tensor:
        """Which experts (T, E) each token is sent to."""
        few = min(math.ceil(self.factor), self.num_experts)
        best_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
        best_TE.scatter_(1, best_experts(probs_TE, few), True)
        return torch.where(self.num_updates > 0, probs_TE >= self.threshold, best_TE)

    @torch.no_grad()
    def adapt(self, routings: Sequence[Routing]) -> None:
        """Move the thresholds towards the C-th largest probability of these routings' tokens.

        Across ranks the thresholds are averaged. Without real tokens nothing changes.
        """
        probs = [
            r.probs if r.real is None else r.probs[r.real] for r in routings if r.probs is not None
        ]
        probs_TE = torch.cat(probs) if probs else self.threshold.new_zeros(0, self.num_experts)
        seen = torch.tensor(float(probs_TE.shape[0] > 0), device=self.threshold.device)
        found_E = torch.zeros_like(self.threshold)
        if probs_TE.shape[0]:
            share = fair_share(self.factor, probs_TE.shape[0], self.num_experts)
            found_E = probs_TE.topk(share, dim=0).values[-1].to(self.threshold.dtype)
        if num_ranks() > 1:
            seen, found_E = summed_over_ranks(seen), summed_over_ranks(found_E)
        found_E = found_E / seen.clamp(min=1.0)
        keep = torch.where(self.num_updates > 0, self.decay, 0.0)
        moved_E = keep * self.threshold + (1.0 - keep) * found_E
        self.threshold.copy_(torch.where(seen > 0, moved_E, self.threshold))
        self.num_updates += (seen > 0).long()
