"""The product of a few rows equals `F.linear` in every layout and mode."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moezoo.ops.few_rows import few_rows_linear


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (8, 64), (1, 1)])
def test_it_equals_a_linear_map(rows: int, sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, sizes[0], generator=generator)
    weight = torch.randn(sizes[1], sizes[0], generator=generator)
    expected = F.linear(x, weight)
    with torch.no_grad():
        torch.testing.assert_close(few_rows_linear(x, weight), expected)
        strided = torch.stack([x, x], dim=-1)[..., 0]
        torch.testing.assert_close(few_rows_linear(strided, weight), expected)
        found = few_rows_linear(x[:, None], weight)
    assert found.shape == (rows, 1, sizes[1])
    assert found.is_contiguous()


def test_gradients_are_those_of_a_linear_map() -> None:
    x, weight = torch.randn(1, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    few_rows_linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_autocast_and_other_dtypes_keep_their_meaning() -> None:
    x, weight = torch.randn(1, 5), torch.randn(3, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert few_rows_linear(x, weight).dtype == torch.bfloat16
    with torch.no_grad():
        assert few_rows_linear(x.double(), weight.double()).dtype == torch.float64
