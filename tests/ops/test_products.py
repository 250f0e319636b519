"""One product equals `mm` whatever library computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moezoo.ops.products import product


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 9, 33])
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16), (8, 64), (1, 1), (7, 3)])
@pytest.mark.parametrize("relu", [False, True])
def test_it_equals_mm_in_every_layout(rows: int, sizes: tuple[int, int], relu: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs, outputs = sizes
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    expected = torch.mm(x, weight.t())
    expected = expected.relu() if relu else expected
    layouts: list[Tensor] = [
        weight,
        weight.t().contiguous().t(),
        torch.stack([weight] * 2, 2)[..., 0],
    ]
    for matrix in layouts:
        found = product(x, matrix, relu=relu)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()
    torch.testing.assert_close(
        product(x[:, :1].expand(rows, inputs), weight)[:1],
        (x[:1, :1].expand(-1, inputs) @ weight.t()),
    )


def test_without_onednn_the_values_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(9, 16), torch.randn(24, 16)
    found = product(x, weight, relu=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(product(x, weight, relu=True), found)
