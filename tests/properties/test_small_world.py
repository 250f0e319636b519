"""All assignments of a small world under every policy and capacity: who is kept, not only how many.

T <= 6 tokens, E <= 3 experts, k <= 2 choices, with and without padding and ties, against loops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import pytest
import torch

import moezoo
from tests.properties.small_world import (
    World,
    admits,
    by_rank,
    by_token,
    rerouted,
    seeded,
    served,
    table,
    world,
)

MAX_TOKENS, MAX_EXPERTS = 6, 3
SIZES = [(e, k) for e in range(1, MAX_EXPERTS + 1) for k in (1, 2) if k <= e]
PADDING: list[dict[str, bool]] = [{}, {"padded": True}]
TIES: list[dict[str, bool]] = [{"ties": True}, {"ties": True, "padded": True}]

every_size = pytest.mark.parametrize(("num_experts", "choices"), SIZES)
every_padding = pytest.mark.parametrize("variant", PADDING, ids=lambda v: "-".join(v) or "plain")
every_variant = pytest.mark.parametrize(
    "variant", PADDING + TIES, ids=lambda v: "-".join(v) or "plain"
)


@lru_cache(maxsize=8)
def cached(num_tokens: int, num_experts: int, choices: int, ties: bool, padded: bool) -> World:
    return world(num_tokens, num_experts, choices, ties=ties, padded=padded)


def with_limits(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> Iterator[tuple[World, int]]:
    """Every world under every capacity from 1 to one more than there are tokens."""
    for w in worlds(num_experts, choices, variant):
        for limit in range(1, w.real.shape[1] + 2):
            yield w, limit


def worlds(num_experts: int, choices: int, variant: dict[str, bool]) -> Iterator[World]:
    both = variant.get("ties", False), variant.get("padded", False)
    # 6^6 choices: with padding, 5 tokens show what 6 would.
    most = MAX_TOKENS - 1 if both[1] and (num_experts, choices) == (3, 2) else MAX_TOKENS
    for num_tokens in range(1, most + 1):
        yield cached(num_tokens, num_experts, choices, *both)


@every_padding
@every_size
def test_first_come_keeps_the_first(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> None:
    for w, limit in with_limits(num_experts, choices, variant):
        for order, pairs in (("rank", by_rank(w)), ("token", by_token(w))):
            expected = table(w, served(w, pairs, limit)[0])
            for training in (True, False):
                admits(w, expected, training=training, name="first_come", limit=limit, order=order)


@every_variant
@every_size
def test_batch_priority_keeps_the_surest(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> None:
    for w, limit in with_limits(num_experts, choices, variant):
        first = w.probs.gather(2, w.expert[:, :, :1])[:, :, 0]
        expected = table(w, served(w, by_rank(w, first), limit)[0])
        admits(w, expected, name="batch_priority", limit=limit)


@every_padding
@every_size
def test_random_order_keeps_the_first_of_its_permutation(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> None:
    for w, limit in with_limits(num_experts, choices, variant):
        drawn = torch.rand(w.real.numel(), generator=seeded(7)).view(w.real.shape)
        expected = table(w, served(w, by_rank(w, drawn), limit)[0])
        for training in (True, False):
            admits(w, expected, training=training, name="random_order", limit=limit, seed=7)
        torch.manual_seed(7)
        admits(w, expected, name="random_order", limit=limit)
        by_position = table(w, served(w, by_rank(w), limit)[0])
        admits(w, by_position, training=False, name="random_order", limit=limit)


@every_padding
@every_size
def test_reroute_moves_who_finds_no_place(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> None:
    for w, limit in with_limits(num_experts, choices, variant):
        seated, at = rerouted(w, limit)
        first_come = served(w, by_rank(w), limit)[0]
        assert bool((seated >= first_come).all())
        if choices == 1:
            places = w.real.sum(1).clamp(max=limit * num_experts)
            assert torch.equal(seated.sum(1), places), "nothing is dropped while there is a place"
        admits(w, table(w, seated, at), name="reroute", limit=limit)


@every_padding
@every_size
def test_transformers_counts_padding_and_never_keeps_it(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> None:
    for w, limit in with_limits(num_experts, choices, variant):
        expected = table(w, served(w, by_rank(w), limit, everyone=True)[0])
        for training in (True, False):
            admits(w, expected, training=training, name="transformers", limit=limit)


@every_padding
@every_size
def test_dropless_keeps_all_that_is_real(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> None:
    for w in worlds(num_experts, choices, variant):
        for training in (True, False):
            admits(w, table(w, w.real_WP), training=training, name="dropless")


@every_padding
@every_size
def test_switch_drops_in_training_and_not_in_evaluation(
    num_experts: int, choices: int, variant: dict[str, bool]
) -> None:
    for w, limit in with_limits(num_experts, choices, variant):
        factor = limit * num_experts / (w.real.shape[1] * choices)  # a limit by its factor alone
        limited = table(w, served(w, by_token(w), limit)[0])
        everybody = table(w, w.real_WP)
        admits(w, limited, name="switch", factor=factor)
        admits(w, everybody, training=False, name="switch", factor=factor)
        admits(w, limited, training=False, name="switch", factor=9.0, eval_factor=factor)
        in_ranks = table(w, served(w, by_rank(w), limit)[0])
        admits(w, in_ranks, name="switch", factor=factor, order="rank")


def slots(rule: str, factor: Fraction, s: int, k: int, e: int) -> int:
    """The limit rules again, in exact arithmetic."""
    if rule == "switch":
        return max(math.ceil(factor * s * k / e), 1)
    if rule == "flaxformer":
        return max(round(factor * s / e), 4)
    if rule == "mesh":
        return max(min(s, math.floor(factor * s / e)), 4)
    return -(-math.ceil(factor * s * k / e) // 4) * 4


@pytest.mark.parametrize("rule", ["switch", "flaxformer", "mesh", "vmoe"])
@pytest.mark.parametrize("name", ["first_come", "batch_priority", "random_order", "reroute"])
def test_factors_of_training_and_evaluation_give_the_limit_of_their_rule(
    name: str, rule: str
) -> None:
    factors = [Fraction(n, 4) for n in (1, 2, 3, 5, 8)]
    for num_experts, choices in SIZES:
        for w, factor in itertools.product(worlds(num_experts, choices, {}), factors):
            if len(w.expert) > 2000:
                continue  # the same rule as with fewer tokens, at a hundred times the price
            limit = slots(rule, factor, w.real.shape[1], choices, num_experts)
            first = w.probs.gather(2, w.expert[:, :, :1])[:, :, 0]
            seated, at = rerouted(w, limit)
            drawn = torch.rand(w.real.numel(), generator=seeded(3)).view(w.real.shape)
            expected = {
                "first_come": table(w, served(w, by_rank(w), limit)[0]),
                "batch_priority": table(w, served(w, by_rank(w, first), limit)[0]),
                "random_order": table(w, served(w, by_rank(w, drawn), limit)[0]),
                "reroute": table(w, seated, at),
            }[name]
            spec = {"name": name, "rule": rule} | ({"seed": 3} if name == "random_order" else {})
            admits(w, expected, factor=float(factor), eval_factor=16.0, **spec)
            admits(w, expected, training=False, factor=16.0, eval_factor=float(factor), **spec)


def test_every_policy_has_its_loop_here() -> None:
    ours = {n for n in moezoo.capacity.names()
            if moezoo.capacity.registry.get(n).__module__.startswith("moezoo.")}  # fmt: skip
    assert ours == {
        "batch_priority", "dropless", "first_come", "random_order", "reroute", "switch",
        "transformers",
    }  # fmt: skip


def test_a_wrong_policy_is_caught_with_the_world_that_shows_it() -> None:
    w = world(3, 2, 1)
    one_too_many = table(w, served(w, by_rank(w), 2)[0])
    with pytest.raises(AssertionError, match=r"kept \[.*\] instead of \[.*\]"):
        admits(w, one_too_many, name="first_come", limit=1)
