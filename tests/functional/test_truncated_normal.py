"""Initial weights: a normal cut at two standard deviations, of the asked-for deviation."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from moezoo.functional.truncated_normal import truncated_normal_


def test_draws_follow_the_truncated_normal() -> None:
    torch.manual_seed(0)
    draws = truncated_normal_(torch.empty(20_000), std=1.0).numpy()
    parent = 1.0 / stats.truncnorm(-2, 2).std()
    assert stats.kstest(draws, stats.truncnorm(-2, 2, scale=parent).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_deviation_is_the_given_one_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = truncated_normal_(torch.empty(100, 400, dtype=dtype), std=0.05)
    assert weight.dtype == dtype
    assert weight.float().std().item() == pytest.approx(0.05, rel=0.02)
    assert weight.float().abs().max().item() <= 2.3 * 0.05
    assert weight.unique().numel() > 1000


def test_the_meta_device_stays_meta() -> None:
    assert truncated_normal_(torch.empty(3, device="meta"), std=1.0).is_meta
