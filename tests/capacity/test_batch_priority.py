"""Batch priority: the surest tokens are served first."""

from __future__ import annotations

import pytest
import torch

from tests.capacity.routings import kept, of_probs, policy, proposed, routing


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_batch_priority_equals_a_loop(k: int, seed: int) -> None:
    record = routing(24, 3, k, seed=seed, group_size=8, padded=True)
    assert record.probs is not None
    assert record.real is not None
    ranked = record.probs.sort(dim=-1, descending=True).indices
    order = sorted(range(24), key=lambda t: (-record.probs[t].max().item(), t))
    used: dict[tuple[int, int], int] = {}
    wanted = []
    for rank in range(k):
        for t in order:
            queue = (t // 8, int(ranked[t, rank]))
            if record.real[t] and used.get(queue, 0) < 2:
                used[queue] = used.get(queue, 0) + 1
                wanted.append((t, queue[1]))
    assert kept(policy("batch_priority", limit=2)(record)) == wanted


def test_a_later_surer_token_takes_the_place_of_an_earlier_one() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    assert kept(policy("batch_priority", limit=2)(of_probs(probs))) == [(1, 0), (2, 0)]


def test_equal_weights_are_served_by_position() -> None:
    probs = torch.full((8, 2), 0.5)
    assert kept(policy("batch_priority", limit=3)(of_probs(probs))) == [(0, 0), (1, 0), (2, 0)]


def test_second_choices_wait_for_all_first_ones_however_sure() -> None:
    probs = torch.tensor([[0.05, 0.95], [0.6, 0.4]])
    admitted = policy("batch_priority", limit=1)(of_probs(probs, 2))
    assert kept(admitted) == [(0, 1), (1, 0)]


def test_enough_capacity_keeps_every_pair() -> None:
    record = routing(12, 3, 2)
    admitted = policy("batch_priority", limit=12)(record)
    assert sorted(kept(admitted)) == sorted(kept(proposed(record)))
