"""Scaling bytes equals torch's multiplication, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.upcycle.finite import check_finite
from moezoo.adapters.upcycle.scaling import scale_bytes
from moezoo.errors import NonFiniteWeights

DTYPES = {
    "F16": (torch.float16, torch.int16),
    "BF16": (torch.bfloat16, torch.int16),
    "F32": (torch.float32, torch.int32),
    "F64": (torch.float64, torch.int64),
}
FACTORS = (0.125, 0.5, 2.0, 3.0, 8.0, 8 / 3, 128.0, 2.0**20)


@given(dtype=st.sampled_from(sorted(DTYPES)), factor=st.sampled_from(FACTORS), data=st.data())
def test_scaled_bytes_are_torchs_products(dtype: str, factor: float, data: st.DataObject) -> None:
    kind, integer = DTYPES[dtype]
    size = kind.itemsize
    words = data.draw(st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=40))
    content = b"".join(words)
    values = torch.frombuffer(bytearray(content), dtype=kind)
    expected = values * factor
    overflow = bool((expected.isinf() & values.isfinite()).any())
    if overflow:
        with pytest.raises(NonFiniteWeights, match="leaves the range"):
            scale_bytes(content, dtype, factor)
        return
    found = torch.frombuffer(bytearray(scale_bytes(content, dtype, factor)), dtype=kind)
    same = found.view(integer) == expected.view(integer)
    assert bool((same | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("factor", [0.125, 0.5, 2.0, 8.0, 2.0**20])
def test_words_at_the_edge_of_every_highest_byte_scale_like_torch(
    dtype: str, factor: float
) -> None:
    kind, integer = DTYPES[dtype]
    size = kind.itemsize
    for top in range(256):
        for rest in (b"\x00", b"\xff", b"\x80", b"\x01"):
            content = (rest * (size - 1) + bytes([top])) * 3  # all alike: nothing hides a word
            values = torch.frombuffer(bytearray(content), dtype=kind)
            expected = values * factor
            if bool((expected.isinf() & values.isfinite()).any()):
                with pytest.raises(NonFiniteWeights, match="leaves the range"):
                    scale_bytes(content, dtype, factor)
                continue
            found = torch.frombuffer(bytearray(scale_bytes(content, dtype, factor)), dtype=kind)
            same = found.view(integer) == expected.view(integer)
            assert bool((same | (found.isnan() & expected.isnan())).all()), (top, rest)


@given(dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 2**31))
def test_ordinary_weights_scale_exactly_and_back(dtype: str, seed: int) -> None:
    kind, integer = DTYPES[dtype]
    weights = torch.randn(257, generator=torch.Generator().manual_seed(seed)).to(kind)
    weights[::5] = 0.0
    there = scale_bytes(tensor_bytes(weights), dtype, 8.0)
    assert bytes(scale_bytes(there, dtype, 0.125)) == bytes(tensor_bytes(weights))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_found(dtype: str, value: float) -> None:
    kind, _ = DTYPES[dtype]
    weights = torch.full((9,), torch.finfo(kind).max, dtype=kind)
    check_finite(tensor_bytes(weights), dtype, "w", "f")
    weights[4] = value
    with pytest.raises(NonFiniteWeights, match="'w' holds NaN"):
        check_finite(tensor_bytes(weights), dtype, "w", "f")
