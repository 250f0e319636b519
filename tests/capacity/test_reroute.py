"""Rerouting: no token left behind while there is a place."""

from __future__ import annotations

import pytest
import torch

from moezoo.errors import ConfigError
from moezoo.records import Routing
from tests.capacity.routings import kept, of_probs, policy, proposed, routing


def by_loop(record: Routing, limit: int, hops: int, group_size: int) -> list[tuple[int, int]]:
    """The kept pairs of `reroute`, for one choice per token."""
    assert record.probs is not None
    used: dict[tuple[int, int], int] = {}
    place: dict[int, int] = {}
    ranked = record.probs.sort(dim=-1, descending=True, stable=True).indices.tolist()
    for hop in range(hops + 1):
        for t, order in enumerate(ranked):
            queue = (t // group_size, order[hop])
            is_real = record.real is None or bool(record.real[t])
            if is_real and t not in place and used.get(queue, 0) < limit:
                used[queue] = used.get(queue, 0) + 1
                place[t] = order[hop]
    return sorted(place.items())


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_reroute_equals_a_loop(hops: int, seed: int) -> None:
    record = routing(24, 4, seed=seed, group_size=8, padded=True)
    admitted = policy("reroute", limit=2, hops=hops)(record)
    assert sorted(kept(admitted)) == by_loop(record, 2, hops, 8)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_reroute_keeps_everything_that_first_come_keeps(k: int, seed: int) -> None:
    record = routing(24, 4, k, seed=seed, padded=True)
    moved = policy("reroute", limit=4)(record).check(record.real)
    assert set(kept(policy("first_come", limit=4)(record))) <= set(kept(moved))
    load = torch.bincount(moved.expert[moved.kept], minlength=4)
    assert int(load.max()) <= 4


def test_nothing_is_dropped_where_the_places_suffice() -> None:
    record = routing(24, 3)
    assert len(kept(policy("reroute", limit=8)(record))) == 24


def test_a_moved_pair_weighs_the_probability_of_its_new_expert() -> None:
    probs = torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.4, 0.1]], requires_grad=True)
    admitted = policy("reroute", limit=1)(of_probs(probs))
    assert kept(admitted) == [(0, 0), (1, 1)]
    assert admitted.weight.tolist() == pytest.approx([0.6, 0.4])
    admitted.weight[1].backward()
    assert probs.grad is not None
    assert probs.grad[1].tolist() == [0.0, 1.0, 0.0]


def test_a_pair_without_a_place_stays_where_it_was() -> None:
    record = of_probs(torch.tensor([[0.9, 0.1]] * 5))
    admitted = policy("reroute", limit=1)(record)
    assert kept(admitted) == [(0, 0), (1, 1)]
    assert torch.equal(admitted.expert[2:], proposed(record).expert[2:])


def test_both_overflowing_pairs_of_a_token_get_different_experts() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2)
    admitted = policy("reroute", limit=1)(of_probs(probs, 2)).check()
    assert sorted(kept(admitted)) == [(0, 0), (0, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("hops", [0, -1])
def test_fewer_than_one_hop_is_refused(hops: int) -> None:
    with pytest.raises(ConfigError, match="hops is a whole number >= 1"):
        policy("reroute", hops=hops)
