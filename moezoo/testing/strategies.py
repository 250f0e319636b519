"""Hypothesis strategies: they draw sizes and a seed, not tensors, so that failures shrink well."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from moezoo.functional.assign import pairs_of
from moezoo.records import Routing, Tokens
from moezoo.testing.invariants import Case


def cases(
    *,
    max_group: int = 12,
    max_groups: int = 3,
    max_experts: int = 6,
    min_tokens: int = 0,
    training: bool | None = None,
    device: str = "cpu",
) -> st.SearchStrategy[Case]:
    """Cases with at most 64 tokens: padding, ties, several groups, one expert, no token at all."""
    return st.builds(
        Case,
        group_size=st.integers(min(min_tokens, max_group), max_group),
        groups=st.integers(1, max_groups),
        num_experts=st.integers(1, max_experts),
        seed=st.integers(0, 2**20),
        padded=st.booleans(),
        training=st.booleans() if training is None else st.just(training),
        ties=st.booleans(),
        device=st.just(device),
    )


def token_batches() -> st.SearchStrategy[Tokens]:
    """Token batches (T, 6), T <= 64, some with padding."""
    return cases().map(lambda case: case.tokens())


def routings(*, max_choices: int = 2) -> st.SearchStrategy[Routing]:
    """Token-choice routings as a router would propose them, without any router."""
    return st.builds(routing_of, cases(), st.integers(1, max_choices))


def routing_of(case: Case, choices: int = 1) -> Routing:
    """The routing of a case: each token's `choices` best experts of random scores.

    With ties, scores are multiples of 1/4, so that weights within and across tokens are equal.
    """
    tokens = case.tokens()
    choices = min(choices, case.num_experts)
    scores = case.noise(case.num_tokens, case.num_experts, purpose=2)
    if case.ties:
        scores = (scores * 2).round() / 2
    probs = scores.softmax(-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :choices]
    assignment = pairs_of(order, probs.gather(1, order), case.num_experts, tokens)
    return Routing(assignment, logits=scores, probs=probs, real=tokens.real)


def without(routing: Routing, keep: torch.Tensor, group_size: int) -> Routing:
    """The routing of the kept tokens alone, in order; for token-choice routings of one group."""
    a = routing.assignment
    assert hasattr(a, "token")
    chosen = keep[a.token]
    number = keep.long().cumsum(0) - 1
    count = int(keep.sum())
    from moezoo.records import Assignment

    assert isinstance(a, Assignment)
    smaller = Assignment(
        token=number[a.token[chosen]],
        expert=a.expert[chosen],
        weight=a.weight[chosen],
        kept=a.kept[chosen],
        num_tokens=count,
        num_experts=a.num_experts,
        group_size=group_size,
        choices=a.choices,
    )
    real = None if routing.real is None else routing.real[keep]
    logits = None if routing.logits is None else routing.logits[keep]
    probs = None if routing.probs is None else routing.probs[keep]
    return Routing(smaller, logits=logits, probs=probs, real=real)
