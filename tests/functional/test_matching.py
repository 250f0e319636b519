"""The exact balanced assignment against brute force and scipy."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moezoo.functional.matching import balanced_assignment


def total(score: Tensor, expert: Tensor) -> float:
    return float(score[torch.arange(score.shape[0]), expert].sum())


def scores(seed: int, num_rows: int, num_experts: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    score = torch.randn(num_rows, num_experts, generator=source, dtype=torch.float64)
    skew = 3 * torch.arange(num_experts) if seed % 3 == 0 else 0  # everybody wants the last
    return (score.round() if seed % 4 == 0 else score) + skew  # every fourth is full of ties


@pytest.mark.parametrize("seed", range(40))
def test_total_equals_brute_force_on_small_sizes(seed: int) -> None:
    num_experts, num_rows = 2 + seed % 2, 1 + seed % 7
    score = scores(seed, num_rows, num_experts)
    low, high = num_rows // num_experts, -(-num_rows // num_experts)
    best = max(
        sum(score[row, e].item() for row, e in enumerate(choice))
        for choice in itertools.product(range(num_experts), repeat=num_rows)
        if all(low <= choice.count(e) <= high for e in range(num_experts))
    )
    expert = balanced_assignment(score)
    load = torch.bincount(expert, minlength=num_experts)
    assert low <= int(load.min()) <= int(load.max()) <= high
    assert total(score, expert) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_total_equals_scipys_linear_sum_assignment(seed: int) -> None:
    num_experts, seats = 1 + seed % 8, 1 + seed % 9
    score = scores(seed, num_experts * seats, num_experts)
    seat_of = score.repeat_interleave(seats, dim=1).numpy()
    rows, columns = linear_sum_assignment(seat_of, maximize=True)
    expert = balanced_assignment(score)
    assert torch.bincount(expert, minlength=num_experts).tolist() == [seats] * num_experts
    assert total(score, expert) == pytest.approx(seat_of[rows, columns].sum(), abs=1e-9)


def test_equal_scores_are_split_evenly() -> None:
    assert torch.bincount(balanced_assignment(torch.zeros(40, 8))).tolist() == [5] * 8


def test_no_rows_and_one_expert_work() -> None:
    assert balanced_assignment(torch.zeros(0, 3)).tolist() == []
    assert balanced_assignment(torch.randn(4, 1)).tolist() == [0] * 4


def test_infinite_and_undefined_scores_still_give_equal_loads() -> None:
    score = torch.randn(8, 4)
    score[0], score[1, 2] = float("nan"), float("inf")
    assert torch.bincount(balanced_assignment(score)).tolist() == [2] * 4
