"""What two routings have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from moezoo.records import Assignment, Routing, SoftAssignment
from moezoo.testing.invariants import close


def decisions(routing: Routing) -> list[Tensor]:
    """What a routing decides, as tensors: kept pairs in order with weights, or the soft maps."""
    a = routing.assignment
    if isinstance(a, SoftAssignment):
        return [a.dispatch, a.combine]
    return [a.token[a.kept], a.expert[a.kept], a.weight[a.kept]]


def pairs_of_token(routing: Routing, token: int) -> tuple[list[int], Tensor]:
    """A token's kept pairs: experts in order, and their weights."""
    a = routing.assignment
    assert isinstance(a, Assignment), "a soft routing has no pairs"
    mine = (a.token == token) & a.kept
    return a.expert[mine].tolist(), a.weight[mine].detach()


def same_pairs(
    found: tuple[list[int], Tensor], expected: tuple[list[int], Tensor], what: str
) -> None:
    """Assert that a token's pairs are equal, weights up to rounding."""
    assert found[0] == expected[0], f"{what} goes to experts {found[0]} instead of {expected[0]}"
    close(found[1], expected[1], f"{what} has other weights")


def alike(found: Routing, expected: Routing, cut: int) -> bool:
    """Whether tokens before `cut` have equal pairs, weights up to rounding: all of them at once,
    which is quicker than one by one, but names none.
    """
    pairs = []
    for routing in (found, expected):
        a = routing.assignment
        assert isinstance(a, Assignment), "a soft routing has no pairs"
        mine = ((a.token < cut) & a.kept).nonzero()[:, 0]
        mine = mine[a.token[mine].argsort(stable=True)]
        pairs.append((a.token[mine], a.expert[mine], a.weight[mine].detach()))
    (token, expert, weight), (old_token, old_expert, old_weight) = pairs
    if not torch.equal(token, old_token) or not torch.equal(expert, old_expert):
        return False
    return torch.allclose(weight, old_weight, atol=1e-5, rtol=1e-4)


def weights_of(routing: Routing) -> tuple[Tensor, ...]:
    """The weights of the pairs, or the soft maps."""
    a = routing.assignment
    return (a.dispatch, a.combine) if isinstance(a, SoftAssignment) else (a.weight,)


def check_choices(a: Assignment, choices: int) -> None:
    """Assert that every token has the promised number of pairs."""
    counts = a.token.new_zeros(a.num_tokens)
    counts.index_add_(0, a.token, torch.ones_like(a.token))
    assert bool((counts == choices).all()), f"pairs per token {counts.tolist()}, promised {choices}"
    assert a.choices == choices, f"Assignment.choices is {a.choices}, promised {choices}"
