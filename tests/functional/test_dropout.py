"""The cheap dropout: equal in distribution to torch's, differentiable, reproducible."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moezoo.functional.dropout import Dropout, dropout, relu_dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.4, 0.9])
def test_each_element_is_dropped_with_probability_p_and_the_mean_is_kept(p: float) -> None:
    torch.manual_seed(0)
    count = 400_000
    y = dropout(torch.ones(count), p, training=True)
    sigma = (p * (1 - p) / count) ** 0.5
    assert abs((y == 0).float().mean().item() - p) < 4 * sigma + 1 / 65536
    assert abs(y.mean().item() - 1.0) < 4 * sigma / (1 - p) + 1e-4
    assert y.unique().numel() == 2


def test_drops_are_independent_of_their_neighbours() -> None:
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(400_000), 0.3, training=True) == 0).double()
    for lag in (1, 2, 3, 4, 5):
        correlation = torch.corrcoef(torch.stack([dropped[:-lag], dropped[lag:]]))[0, 1]
        assert abs(correlation.item()) < 4 / 400_000**0.5


def test_the_number_of_drops_varies_as_a_binomial() -> None:
    torch.manual_seed(0)
    drops = (dropout(torch.ones(2_000, 500), 0.1, training=True) == 0).sum(1).double()
    assert drops.var().item() == pytest.approx(500 * 0.1 * 0.9, rel=0.15)


def test_the_gradient_flows_through_what_was_kept() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, (y / x).detach()))


def test_a_seed_reproduces_the_mask_and_evaluation_changes_nothing() -> None:
    x = torch.randn(33, 5)
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(dropout(x, 0.5, training=True))
    assert torch.equal(*masks)
    layer = Dropout(0.5)
    assert layer.eval()(x) is x
    assert dropout(x, 0.0, training=True) is x


def test_relu_dropout_is_dropout_of_the_relu() -> None:
    x = torch.randn(40, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for compute in (
        lambda: relu_dropout(x, 0.3, training=True),
        lambda: dropout(torch.relu(x), 0.3, training=True),
    ):
        torch.manual_seed(2)
        y = compute()
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(relu_dropout(x, 0.3, training=False), torch.relu(x))


def test_both_differentiate_twice() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for compute in (dropout, relu_dropout):

        def seeded(x: torch.Tensor, compute: Any = compute) -> torch.Tensor:
            torch.manual_seed(4)
            return compute(x, 0.4, training=True) ** 2

        assert torch.autograd.gradcheck(seeded, x)
        assert torch.autograd.gradgradcheck(seeded, x)


@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 0, 3), (5, 3)])
def test_every_size_works(shape: tuple[int, ...]) -> None:
    assert dropout(torch.ones(shape), 0.5, training=True).shape == shape
