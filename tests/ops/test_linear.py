"""The linear map of the models equals `F.linear` in every layout and mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.ops import linear as module
from moezoo.ops import products
from moezoo.ops.linear import linear
from moezoo.ops.products import LIMITS


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (8, 64), (1, 1)])
def test_it_equals_a_linear_map(rows: int, sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, sizes[0], generator=generator)
    weight = torch.randn(sizes[1], sizes[0], generator=generator)
    expected = F.linear(x, weight)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), expected)
        strided = torch.stack([x, x], dim=-1)[..., 0]
        torch.testing.assert_close(linear(strided, weight), expected)
        found = linear(x[:, None], weight)
    assert found.shape == (rows, 1, sizes[1])
    assert found.is_contiguous()


@pytest.mark.parametrize("vendor", LIMITS)
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (5, 24), (3, 37, 24), (2, 129, 24)])
@pytest.mark.parametrize("width", [24, 1000, 7])
def test_gradients_of_both_orders_are_those_of_a_linear_map(
    vendor: str, shape: tuple[int, ...], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changed in (products, module):
        monkeypatch.setattr(changed, "limits", lambda: LIMITS[vendor])
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(width, shape[-1]) / shape[-1]
    found, expected = (_gradients(compute, x, weight) for compute in (linear, F.linear))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vendor", LIMITS)
def test_the_result_may_be_changed_in_place(vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for changed in (products, module):
        monkeypatch.setattr(changed, "limits", lambda: LIMITS[vendor])
    x, weight = torch.randn(2, 33, 16), torch.randn(24, 16, requires_grad=True)
    y = linear(x, weight)
    y[0, 0] = 0.0
    y.mul_(2.0).sum().backward()
    assert weight.grad is not None
    expected = 2 * (x.sum((0, 1)) - x[0, 0])
    torch.testing.assert_close(weight.grad, expected.expand(24, 16), rtol=1e-4, atol=1e-4)


def _gradients(
    linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """The result, its gradients, and those of a function of the gradients; each alone, too."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight)
    first = torch.autograd.grad(y.sin().sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), (x, weight))
    alone = torch.autograd.grad(linear(x.detach(), weight).cos().sum(), weight)
    other = torch.autograd.grad(linear(x, weight.detach()).cos().sum(), x)
    spread = torch.autograd.grad(linear(x, weight).sum(), (x, weight))  # an expanded gradient
    return (y.detach(), *first, *second, *alone, *other, *spread)


def test_autocast_and_other_dtypes_keep_their_meaning() -> None:
    x, weight = torch.randn(1, 5), torch.randn(3, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.no_grad():
        assert linear(x.double(), weight.double()).dtype == torch.float64
