"""Token batches and routers for the tests, from a seed."""

from __future__ import annotations

from typing import Any

import torch

from moezoo import routers
from moezoo.records import Assignment, Routing, Tokens
from moezoo.routers import Router

WIDTH, VOCABULARY = 6, 32


def batch(
    num_tokens: int,
    *,
    seed: int = 0,
    group_size: int = 0,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, WIDTH, generator=source, dtype=dtype)
    ids = torch.randint(VOCABULARY, (num_tokens,), generator=source)
    real = torch.rand(num_tokens, generator=source) < 0.7 if padded else None
    return Tokens(x, ids, real, group_size)


def make(name: str, num_experts: int = 4, **options: Any) -> Router:
    """A router whose weights are N(0, 1), so that its choices are clear."""
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "num_experts": num_experts, "vocab_size": VOCABULARY}
    router = routers.build({"name": name, **options}, **sizes)
    for parameter in router.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter)
    return router


def pairs(routing: Routing) -> list[tuple[int, int]]:
    """The kept pairs as (token, expert), in priority order."""
    a = sparse(routing)
    return list(zip(a.token[a.kept].tolist(), a.expert[a.kept].tolist(), strict=True))


def sparse(routing: Routing) -> Assignment:
    assert isinstance(routing.assignment, Assignment)
    return routing.assignment
