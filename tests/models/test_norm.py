"""T5's norm in training, in evaluation and in half precision."""

from __future__ import annotations

import pytest
import torch

from moezoo.models.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_divides_by_the_root_of_the_mean_square(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(8, eps=1e-3).to(dtype), torch.randn(3, 8, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    rounded = (wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()).to(dtype)
    torch.testing.assert_close(norm(x), rounded * norm.weight)


def test_training_and_evaluation_give_the_same_bits() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(8), torch.randn(3, 8)
    trained = norm.train()(x)
    assert torch.equal(trained, norm.eval()(x))
    with torch.no_grad():
        assert torch.equal(trained, norm.train()(x))
