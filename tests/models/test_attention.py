"""Attention, position bias and norm against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from moezoo.models.attention import Attention
from moezoo.models.norm import RMSNorm
from moezoo.models.position import Buckets, PositionBias, relative_bias, relative_buckets
from tests.models.tiny import TINY, source, tiny


def bucket(distance: int, *, bidirectional: bool, buckets: int = 32, furthest: int = 128) -> int:
    """The bucket of a relative position as in Mesh TensorFlow, one number at a time."""
    start, n = 0, -distance
    if bidirectional:
        buckets //= 2
        start, n = (buckets if n < 0 else 0), abs(n)
    else:
        n = max(n, 0)
    exact = buckets // 2
    if n < exact:
        return start + n
    far = exact + int(math.log(n / exact) / math.log(furthest / exact) * (buckets - exact))
    return start + min(far, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_the_formula(bidirectional: bool) -> None:
    distances = [d for d in range(-300, 301) if abs(d) not in (16, 32, 64)]  # logs on a boundary
    found = relative_buckets(
        torch.tensor(distances), bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    assert found.tolist() == [bucket(d, bidirectional=bidirectional) for d in distances]


@pytest.mark.parametrize(("query", "key", "offset"), [(5, 5, 0), (1, 7, 6), (3, 9, 6), (0, 2, 2)])
def test_the_bias_is_the_tables_entry_of_each_pairs_bucket(
    query: int, key: int, offset: int
) -> None:
    table, buckets = PositionBias(32, 3), Buckets(32, 128, bidirectional=False)
    device = table.weight.device
    found = relative_bias(table, buckets, query, key, offset=offset, device=device)
    assert found.shape == (1, 3, query, key)
    for q in range(query):
        for k in range(key):
            expected = table.weight[bucket(k - q - offset, bidirectional=False)]
            assert torch.equal(found[0, :, q, k], expected)


def test_attention_equals_its_formula_with_and_without_dropout_code() -> None:
    torch.manual_seed(0)
    layer = Attention(TINY.replace(dropout_rate=0.5), decoder=False, layer=0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()
    x, bias = torch.randn(2, 5, 16), torch.randn(1, 2, 5, 5)
    q, k, v = (m(x).view(2, 5, 2, 4).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
    mixed = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v
    expected = layer.o(mixed.transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(layer.eval()(x, bias), expected)
    layer.train().dropout = 1e-9  # the training path, dropping nothing
    torch.testing.assert_close(layer(x, bias), expected)


def test_rows_that_share_a_source_attend_as_if_it_were_copied() -> None:
    layer = tiny().decoder.blocks[0].cross_attention
    x, memory = torch.randn(6, 3, 16), torch.randn(2, 5, 16)
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = torch.finfo(torch.float32).min
    copied = layer.cross(x, memory.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))
    torch.testing.assert_close(layer.cross(x, memory, mask), copied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_rows_stay_finite_under_autocast(dtype: torch.dtype) -> None:
    model, ids = tiny(), source(2, 5)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1] = 0
    with torch.autocast("cpu", dtype=dtype):
        out = model(ids, mask, labels=source(2, 4))
    assert torch.isfinite(out.logits).all()
    assert torch.isfinite(out.loss)


def test_the_norm_takes_its_mean_in_float32() -> None:
    norm = RMSNorm(8, eps=1e-6)
    x = torch.randn(3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    large = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square overflows float16
    torch.testing.assert_close(norm.half()(large), torch.ones_like(large))
