"""All assignments of a small world, under every policy and capacity: nothing is left to chance."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moezoo
from moezoo.capacity import CapacityPolicy
from moezoo.errors import ConfigError
from moezoo.records import Assignment, Routing

MAX_TOKENS, MAX_EXPERTS = 6, 3


def worlds(num_experts: int, choices: int) -> Tensor:
    """Every way in which 6 tokens choose `choices` distinct experts: (worlds, T, K)."""
    each = list(itertools.permutations(range(num_experts), choices))
    return torch.tensor(list(itertools.product(each, repeat=MAX_TOKENS)))


def routing_of_all(expert_WTK: Tensor, num_experts: int, num_tokens: int) -> Routing:
    """All worlds as groups of one rank-major routing; probabilities follow the choices."""
    expert_WTK = expert_WTK[:, :num_tokens].unique(dim=0)
    worlds_, tokens, choices = expert_WTK.shape
    flat = expert_WTK.reshape(worlds_ * tokens, choices)
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(flat.shape[0], num_experts, generator=generator) * 0.1
    for rank in range(choices):
        bonus = torch.full((flat.shape[0], 1), float(choices - rank))
        probs.scatter_add_(1, flat[:, rank : rank + 1], bonus)
    probs = probs / probs.sum(-1, keepdim=True)
    assignment = Assignment(
        token=torch.arange(flat.shape[0]).repeat(choices),
        expert=flat.t().reshape(-1),
        weight=probs.gather(1, flat).t().reshape(-1),
        kept=torch.ones(flat.numel(), dtype=torch.bool),
        num_tokens=flat.shape[0],
        num_experts=num_experts,
        group_size=tokens,
        choices=choices,
    )
    return Routing(assignment, logits=probs.log(), probs=probs)


def policy_with(name: str, limit: int) -> CapacityPolicy | None:
    try:
        return moezoo.capacity.build({"name": name, "limit": limit})
    except ConfigError:
        return moezoo.capacity.build(name) if limit == 1 else None


def loads(a: Assignment) -> Tensor:
    key = (a.token // a.group_size) * a.num_experts + a.expert
    return torch.zeros(a.num_groups * a.num_experts, dtype=torch.int64).index_add_(
        0, key, a.kept.long()
    )


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("num_experts", range(1, MAX_EXPERTS + 1))
@pytest.mark.parametrize("name", moezoo.capacity.names())
def test_every_assignment_under_every_capacity(name: str, num_experts: int, choices: int) -> None:
    if choices > num_experts:
        assert policy_with(name, 1) is not None
        return
    everything = worlds(num_experts, choices)
    for num_tokens, limit in itertools.product(range(1, MAX_TOKENS + 1), range(1, MAX_TOKENS + 2)):
        policy = policy_with(name, limit)
        if policy is None:
            break
        routing = routing_of_all(everything, num_experts, num_tokens)
        offered = routing.assignment
        assert isinstance(offered, Assignment)
        admitted = policy.train()(routing)
        slots = policy.limit(routing)
        kept, demand = loads(admitted), loads(offered)
        if slots is None:
            assert torch.equal(kept, demand)
            continue
        assert int(kept.max()) <= slots
        if policy.moves:
            assert bool((kept >= demand.clamp(max=slots)).all())
        else:
            assert torch.equal(kept, demand.clamp(max=slots)), "kept = min(C, demand)"
