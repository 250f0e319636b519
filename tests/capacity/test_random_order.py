"""Random order: no position is dropped more often than another."""

from __future__ import annotations

import pytest
import torch

from moezoo.errors import ConfigError
from tests.capacity.routings import kept, of_probs, policy, routing


def test_every_position_is_kept_equally_often_in_training() -> None:
    record, admit = of_probs(torch.tensor([[1.0, 0.0]] * 8)), policy("random_order", limit=2)
    torch.manual_seed(0)
    count = torch.zeros(8)
    for _ in range(2000):
        count[[t for t, _ in kept(admit(record))]] += 1
    assert (count / 2000 - 0.25).abs().max() < 0.04


def test_every_queue_is_filled_to_its_limit() -> None:
    record = routing(24, 3, 2, group_size=8, padded=True)
    fair, first = policy("random_order", limit=2)(record), policy("first_come", limit=2)(record)
    assert len(kept(fair)) == len(kept(first))


def test_evaluation_without_a_seed_goes_by_position() -> None:
    record = routing(24, 3, 2)
    admitted = policy("random_order", limit=3).eval()(record)
    assert kept(admitted) == kept(policy("first_come", limit=3)(record))


def test_a_seed_fixes_the_permutation_and_leaves_torchs_generator_alone() -> None:
    record, admit = routing(), policy("random_order", limit=2, seed=7)
    state = torch.get_rng_state()
    assert kept(admit(record)) == kept(admit.eval()(record))
    assert torch.equal(torch.get_rng_state(), state)
    assert kept(policy("random_order", limit=2, seed=8)(record)) != kept(admit(record))


def test_first_choices_are_served_before_second_ones() -> None:
    record, admit = routing(24, 2, 2), policy("random_order", limit=12)
    admitted = admit(record)
    assert sorted(admitted.token[:24].tolist()) == list(range(24))
    assert record.probs is not None
    firsts = record.probs.argmax(-1)[admitted.token[:24]]
    assert torch.equal(admitted.expert[:24], firsts)


@pytest.mark.parametrize("seed", [-1, True])
def test_a_seed_that_is_no_whole_number_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed"):
        policy("random_order", seed=seed)
