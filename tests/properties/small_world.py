"""Every assignment of a small world, and who is served in it by loops over pairs.

A reference walks through the pairs one by one, in all worlds at once: W worlds of T tokens with K
choices among E experts, P = T * K pairs per world in rank-major order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moezoo
from moezoo.records import Assignment, Routing


@dataclass(frozen=True)
class World:
    """expert (W, T, K); probs (W, T, E), highest for the first choice; real (W, T) bool."""

    expert: Tensor
    probs: Tensor
    real: Tensor

    @property
    def num_experts(self) -> int:
        return self.probs.shape[2]

    @property
    def expert_WP(self) -> Tensor:
        return self.expert.transpose(1, 2).flatten(1)

    @property
    def real_WP(self) -> Tensor:
        return self.real.repeat(1, self.expert.shape[2])

    def routing(self) -> Routing:
        """The worlds as groups of one routing, proposed in rank-major order."""
        worlds, tokens, choices = self.expert.shape
        flat_NK = self.expert.reshape(worlds * tokens, choices)
        probs = self.probs.reshape(worlds * tokens, -1)
        real = self.real.reshape(-1)
        assignment = Assignment(
            token=torch.arange(worlds * tokens).repeat(choices),
            expert=flat_NK.t().reshape(-1),
            weight=probs.gather(1, flat_NK).t().reshape(-1),
            kept=real.repeat(choices),
            num_tokens=worlds * tokens,
            num_experts=self.num_experts,
            group_size=tokens,
            choices=choices,
        )
        return Routing(assignment, logits=probs.log(), probs=probs, real=real)


def world(
    num_tokens: int, num_experts: int, choices: int, *, ties: bool = False, padded: bool = False
) -> World:
    """All ways in which the tokens choose distinct experts, with every pattern of padding for up
    to 50,000 worlds and one drawn pattern per world beyond.
    """
    each = list(itertools.permutations(range(num_experts), choices))
    expert = torch.tensor(list(itertools.product(each, repeat=num_tokens)))
    real = torch.ones(expert.shape[:2], dtype=torch.bool)
    if padded:
        patterns = torch.tensor(list(itertools.product([True, False], repeat=num_tokens)))
        if len(expert) * len(patterns) <= 50_000:
            real = patterns.repeat_interleave(len(expert), dim=0)
            expert = expert.repeat(len(patterns), 1, 1)
        else:
            drawn = torch.randint(len(patterns), (len(expert),), generator=seeded(1))
            real = patterns[drawn]
    probs = 0.1 * torch.rand(*expert.shape[:2], num_experts, generator=seeded(0))
    if ties:
        probs = 0.0 * probs + 0.01
    for rank in range(choices):
        bonus = torch.full((*expert.shape[:2], 1), float(choices - rank))
        probs.scatter_add_(2, expert[:, :, rank : rank + 1], bonus)
    return World(expert, probs / probs.sum(-1, keepdim=True), real)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_rank(w: World, priority_WT: Tensor | None = None) -> Tensor:
    """The order (W, P): all first choices, then all second ones; within a rank by falling priority,
    equal ones by position.
    """
    worlds, tokens, choices = w.expert.shape
    place_WT = torch.arange(tokens).expand(worlds, -1)
    if priority_WT is not None:
        place_WT = priority_WT.argsort(dim=1, descending=True, stable=True)
    return torch.cat([place_WT + rank * tokens for rank in range(choices)], dim=1)


def by_token(w: World) -> Tensor:
    """The order (W, P): one token after the other."""
    worlds, tokens, choices = w.expert.shape
    order_P = torch.arange(tokens * choices).view(choices, tokens).t().reshape(-1)
    return order_P.expand(worlds, -1)


def served(
    w: World, order_WP: Tensor, limit: int, *, everyone: bool = False
) -> tuple[Tensor, Tensor]:
    """First come, first served in the given order: who is (W, P), and the demand (W, E)."""
    expert_WP, real_WP = w.expert_WP, w.real_WP
    seated_WP = torch.zeros_like(real_WP)
    demand_WE = torch.zeros(len(expert_WP), w.num_experts, dtype=torch.int64)
    for place in range(expert_WP.shape[1]):
        pair = order_WP[:, place : place + 1]
        expert, real = expert_WP.gather(1, pair), real_WP.gather(1, pair)
        seated_WP.scatter_(1, pair, real & (demand_WE.gather(1, expert) < limit))
        demand_WE.scatter_add_(1, expert, (torch.ones_like(real) if everyone else real).long())
    return seated_WP, demand_WE


def rerouted(w: World, limit: int) -> tuple[Tensor, Tensor]:
    """No token left behind: who is served (W, P), and where (W, P)."""
    worlds, tokens, choices = w.expert.shape
    seated_WP, demand_WE = served(w, by_rank(w), limit)
    load_WE, at_WP = demand_WE.clamp(max=limit), w.expert_WP.clone()
    others = w.num_experts - choices
    score = w.probs.scatter(2, w.expert, -1.0)  # what a token proposed, it never tries again
    prefer_WTE = score.argsort(dim=2, descending=True, stable=True)
    tried_WT = torch.zeros(worlds, tokens, dtype=torch.int64)
    for _ in range(w.num_experts - 1):
        waiting_WP = w.real_WP & ~seated_WP
        for pair in range(tokens * choices):
            token, waits = pair % tokens, waiting_WP[:, pair]
            column = tried_WT[:, token].clamp(max=w.num_experts - 1)
            target = prefer_WTE[:, token].gather(1, column[:, None])
            room = (load_WE.gather(1, target) < limit)[:, 0]
            goes = waits & room & (tried_WT[:, token] < others)
            tried_WT[:, token] += waits
            seated_WP[:, pair] |= goes
            at_WP[:, pair] = torch.where(goes, target[:, 0], at_WP[:, pair])
            load_WE.scatter_add_(1, target, goes[:, None].long())
    return seated_WP, at_WP


def table(w: World, seated_WP: Tensor, expert_WP: Tensor | None = None) -> Tensor:
    """The served pairs' weights as (W, T, E), 0 where a pair is not served."""
    worlds, tokens, choices = w.expert.shape
    expert_WP = w.expert_WP if expert_WP is None else expert_WP
    served_WTE = torch.zeros(worlds, tokens, w.num_experts)
    for pair in range(tokens * choices):
        row = served_WTE[:, pair % tokens]
        row.scatter_add_(1, expert_WP[:, pair : pair + 1], seated_WP[:, pair : pair + 1].float())
    assert float(served_WTE.max()) <= 1.0, "nobody is served twice by one expert"
    return served_WTE * w.probs


def table_of(w: World, admitted: Assignment) -> Tensor:
    """What a policy admitted, as (W, T, E) of weights."""
    found = torch.zeros(w.probs.shape).view(-1, w.num_experts)
    token, expert = admitted.token[admitted.kept], admitted.expert[admitted.kept]
    found.index_put_((token, expert), admitted.weight[admitted.kept], accumulate=True)
    return found.view(w.probs.shape)


def admits(w: World, expected_WTE: Tensor, *, training: bool = True, **spec: Any) -> None:
    """Assert that the policy of `spec` serves exactly those of the table, at those weights."""
    policy = moezoo.capacity.build(spec).train(training)
    found = policy(w.routing())
    assert isinstance(found, Assignment)
    wrong = (table_of(w, found) != expected_WTE).flatten(1).any(1)
    if bool(wrong.any()):
        one = int(wrong.nonzero()[0])
        where = f"experts {w.expert[one].tolist()}, real {w.real[one].tolist()}"
        kept = (table_of(w, found)[one] > 0).nonzero().tolist()
        wanted = (expected_WTE[one] > 0).nonzero().tolist()
        raise AssertionError(f"{spec}: {where}: kept {kept} instead of {wanted}")
