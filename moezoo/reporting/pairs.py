"""The token-expert pairs of a layer over all calls, padding left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moezoo.functional.queues import positions_in_runs
from moezoo.records import Assignment, Routing, SoftAssignment
from moezoo.reporting.observation import real_tokens

MOST_CHOICES = 8  # experts of a token that a page shows


@dataclass(frozen=True)
class Pairs:
    """N pairs that the router proposed, by token and then by falling share.

    Fields: token (N,), among real tokens; expert (N,); share (N,), the probability that the router
    gave the expert, or the pair's weight where it has no probabilities; kept (N,), computed;
    place (N,), (token among all tokens, padding too) * E + expert; num_tokens, real; num_experts.
    Soft routing has one pair a token: the expert with the largest part of its output.
    """

    token: Tensor
    expert: Tensor
    share: Tensor
    kept: Tensor
    place: Tensor
    num_tokens: int
    num_experts: int

    def by_token(self, values: Tensor, shown: int, choices: int, *, missing: int) -> Tensor:
        """Values (N,) as a table (shown, choices) of the first tokens."""
        table = values.new_full((shown, choices), missing)
        slot_N = positions_in_runs(self.token, max(self.num_tokens, 1))
        fits_N = (self.token < shown) & (slot_N < choices)
        table[self.token[fits_N], slot_N[fits_N]] = values[fits_N]
        return table

    @property
    def choices(self) -> int:
        """The most experts that a token has, as far as they are shown."""
        if not self.token.numel():
            return 1
        return min(int(self.token.bincount().max()), MOST_CHOICES)


def pairs_of(calls: Sequence[Routing]) -> Pairs:
    """The pairs of a layer's calls, at least one."""
    parts: list[tuple[Tensor, ...]] = []
    seen = everyone = 0
    experts = calls[0].assignment.num_experts
    for call in calls:
        real_T = real_tokens(call)
        a = call.assignment
        found = _soft(a, real_T) if isinstance(a, SoftAssignment) else _hard(call, a)
        token_N, expert_N, share_N, kept_N = found
        number_T = real_T.cumsum(0) - 1 + seen
        parts.append((number_T[token_N], expert_N, share_N, kept_N,
                      (token_N + everyone) * experts + expert_N))  # fmt: skip
        seen, everyone = seen + int(real_T.sum()), everyone + len(real_T)
    token, expert, share, kept, place = (torch.cat(column) for column in zip(*parts, strict=True))
    order = share.argsort(descending=True, stable=True)
    order = order[token[order].argsort(stable=True)]
    return Pairs(token[order], expert[order], share[order].float().clamp(0, 1), kept[order],
                 place[order], seen, experts)  # fmt: skip


def _hard(call: Routing, a: Assignment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs that were computed, and those that were proposed and dropped."""
    offered = call.offered
    assert isinstance(offered, Assignment)
    key_N = a.token * a.num_experts + a.expert
    proposed = (offered.token * a.num_experts + offered.expert)[offered.kept]
    shown_N = a.kept | torch.isin(key_N, proposed)
    token_N, expert_N = a.token[shown_N], a.expert[shown_N]
    share_N = a.weight[shown_N] if call.probs is None else call.probs[token_N, expert_N]
    return token_N, expert_N, share_N, a.kept[shown_N]


def _soft(a: SoftAssignment, real_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    share_TE = a.combine.sum(-1).flatten(0, 1)[: len(real_T)]
    token_N = real_T.nonzero().flatten()
    share_N, expert_N = share_TE[token_N].max(-1)
    return token_N, expert_N, share_N, torch.ones_like(token_N, dtype=torch.bool)
