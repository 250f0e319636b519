"""The batched checker of `benchmarks.depth` finds seeded bugs, and nothing in the sound package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import depth
from moezoo.capacity import BatchPriority, FirstCome, RandomOrder, Reroute
from moezoo.functional.queues import queue_positions
from moezoo.records import Assignment, Routing

Admit = Callable[..., Assignment]


def check(batches: int = 20) -> int:
    generator = torch.Generator().manual_seed(0)
    return sum(depth.check_batch(generator, 50) for _ in range(batches))


def test_the_sound_package_passes() -> None:
    assert check() > 20 * 50 * 10


def one_too_many(self: FirstCome, routing: Routing) -> Assignment:
    a = routing.assignment
    return replace(a, kept=a.kept & (queue_positions(a) <= self.limit(routing)))


def one_too_few(self: FirstCome, routing: Routing) -> Assignment:
    a = routing.assignment
    return replace(a, kept=a.kept & (queue_positions(a) < self.limit(routing) - 1))


def last_first(self: FirstCome, routing: Routing) -> Assignment:
    a = routing.assignment
    turned = [tensor.flip(0) for tensor in (a.token, a.expert, a.weight, a.kept)]
    backwards = replace(a, **dict(zip(("token", "expert", "weight", "kept"), turned, strict=True)))
    first = queue_positions(backwards) < self.limit(routing)
    return replace(a, kept=a.kept & first.flip(0))


def by_position(self: FirstCome, routing: Routing) -> Assignment:
    a = routing.assignment
    return replace(a, kept=a.kept & (queue_positions(a) < self.limit(routing)))


def everyone(self: FirstCome, routing: Routing) -> Assignment:
    a = routing.assignment
    position = queue_positions(a, everyone=True)
    return replace(a, kept=position < self.limit(routing))


@pytest.mark.parametrize(
    ("policy", "bug", "claim"),
    [
        (FirstCome, one_too_many, "first_come: at most C per queue"),
        (FirstCome, one_too_few, r"first_come: min\(C, demand\) served"),
        (FirstCome, last_first, "first_come keeps a prefix"),
        (FirstCome, everyone, r"first_come: (min\(C, demand\) served|padding)"),
        (BatchPriority, by_position, "batch_priority keeps the surest"),
        (RandomOrder, one_too_many, "random_order: at most C per queue"),
        (Reroute, one_too_many, "reroute: at most C per queue"),
    ],
)
def test_a_wrong_policy_is_found(
    policy: type, bug: Admit, claim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "forward", bug)
    with pytest.raises(RuntimeError, match=claim):
        check()


def test_wrong_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_one(a: Assignment) -> Tensor:
        return queue_positions(a) + 1

    monkeypatch.setattr(depth, "queue_positions", from_one)
    with pytest.raises(RuntimeError, match="positions equal running sums"):
        check()
