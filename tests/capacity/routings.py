"""Routings and policies for the tests, from a seed or from a table of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moezoo import capacity
from moezoo.capacity import CapacityPolicy
from moezoo.functional.assign import token_choice
from moezoo.records import Assignment, Routing, Tokens


def routing(
    num_tokens: int = 24,
    num_experts: int = 3,
    k: int = 1,
    *,
    seed: int = 0,
    group_size: int = 0,
    padded: bool = False,
) -> Routing:
    """A top-k routing whose first experts are preferred."""
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=source)
    logits[:, 0] += 1.0
    real = torch.rand(num_tokens, generator=source) < 0.7 if padded else None
    return of_probs(logits.softmax(-1), k, real=real, group_size=group_size)


def of_probs(
    probs: Tensor, k: int = 1, *, real: Tensor | None = None, group_size: int = 0
) -> Routing:
    tokens = Tokens(probs, real=real, group_size=group_size)
    return Routing(token_choice(probs, probs, k, tokens), probs=probs, real=real)


def policy(name: str, **options: Any) -> CapacityPolicy:
    return capacity.build({"name": name, **options})


def kept(assignment: Assignment) -> list[tuple[int, int]]:
    """The kept pairs as (token, expert), in list order."""
    a = assignment
    return list(zip(a.token[a.kept].tolist(), a.expert[a.kept].tolist(), strict=True))


def proposed(record: Routing) -> Assignment:
    assert isinstance(record.assignment, Assignment)
    return record.assignment
