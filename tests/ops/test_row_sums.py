"""Sums over rows: each token's, whatever computes them, rounded once in halves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops.row_sums import row_sums

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def summed(y: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    taken = y.double()[rows]
    return (taken if weight is None else taken * weight.double()[..., None]).sum(1)


@given(
    st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 4), st.sampled_from([0, 1, 3, 16]),
    st.sampled_from(DTYPES), st.sampled_from([None, *DTYPES]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_they_equal_sums_in_float64(
    seed: int, tokens: int, choices: int, width: int, dtype: torch.dtype,
    weighed: torch.dtype | None, turned: bool, strided: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, tokens * choices or 1, (tokens, choices), generator=generator)
    rows = rows.t().contiguous().t() if turned else rows
    y = torch.randn(tokens * choices, 2 * width, generator=generator).to(dtype)
    y = y[:, ::2] if strided else y[:, :width]
    weight = None
    if weighed is not None:
        weight = torch.randn(tokens, choices, generator=generator).to(weighed)
    found = row_sums(y, rows, weight)
    assert found.dtype == (dtype if weighed is None else torch.promote_types(dtype, weighed))
    rounding = torch.finfo(found.dtype).eps
    largest = float(summed(y.abs(), rows, None if weight is None else weight.abs()).max()) if (
        found.numel()) else 0.0  # fmt: skip
    torch.testing.assert_close(
        found.double(), summed(y, rows, weight), rtol=0.0, atol=4 * rounding * max(largest, 1e-3)
    )


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype: torch.dtype, weighed: bool) -> None:
    source = torch.Generator().manual_seed(0)
    y = torch.randn(64, 24, generator=source).to(dtype)
    rows = torch.randperm(64, generator=source).view(8, 8)
    weight = torch.rand(8, 8, generator=source).to(dtype) if weighed else None
    exact = summed(y, rows, weight)
    _, exponent = exact.frexp()
    half = torch.finfo(dtype).eps / 4 * 2.0 ** exponent.double()
    assert ((row_sums(y, rows, weight).double() - exact).abs() <= half * (1 + 1e-3)).all()


def test_a_graph_sees_operators_that_it_can_differentiate() -> None:
    y, rows = torch.randn(6, 3, dtype=torch.float64), torch.arange(6).view(3, 2)
    weight = torch.rand(3, 2, dtype=torch.float64)
    compiled = torch.compile(row_sums, fullgraph=True, backend="eager")
    for dtype in (torch.float64, torch.bfloat16):
        torch.testing.assert_close(
            compiled(y.to(dtype), rows, weight.to(dtype)),
            row_sums(y.to(dtype), rows, weight.to(dtype)),
        )
    (gradient,) = torch.func.vjp(lambda y: row_sums(y, rows, weight), y)[1](
        torch.ones(3, 3).double()
    )
    torch.testing.assert_close(gradient, weight.reshape(6, 1).expand(6, 3))
