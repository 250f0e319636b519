"""The RMS norm of training against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moezoo.functional.rms_norm import rms_norm

SHAPES = [(6,), (1, 6), (5, 6), (2, 3, 6), (0, 6)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    return x, torch.randn(shape[-1], dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_have_the_bits_of_torch_and_gradients_its_value(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight = inputs(shape, dtype)
    found, expected = rms_norm(x, weight, 1e-6), F.rms_norm(x, (shape[-1],), weight, 1e-6)
    assert torch.equal(found, expected)
    towards = torch.randn(shape, dtype=dtype)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), towards),
        torch.autograd.grad(expected, (x, weight), towards),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_it_differentiates_twice() -> None:
    given = inputs((2, 3, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), given)
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 1e-3), given)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_gets_no_gradient(frozen: int) -> None:
    given = inputs((4, 6), torch.float64)
    given[frozen].requires_grad_(False)
    rms_norm(*given, 1e-6).square().sum().backward()
    assert given[frozen].grad is None
    assert given[1 - frozen].grad is not None


def test_gradients_in_any_layout_are_taken() -> None:
    x, weight = inputs((4, 6), torch.float64)
    rms_norm(x, weight, 1e-6).sum().backward()  # an expanded gradient
    turned = rms_norm(x.view(2, 2, 6).transpose(0, 1), weight, 1e-6)
    turned.transpose(0, 2).square().sum().backward()
    assert torch.isfinite(x.grad).all()
