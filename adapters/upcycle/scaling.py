"""Multiply weights that are still bytes: powers of two at hundreds of MB/s, without torch.

Adding k to a float's exponent multiplies it by 2^k. A chunk of weights is read as one long integer,
so a single addition scales all of them. The few words whose exponent cannot take it (subnormals,
infinities, results out of range) are found by masks of the same kind and patched one by one.
"""

from __future__ import annotations

import array
import functools
import math
import re
import struct
import sys
from dataclasses import dataclass
from typing import Any

from moezoo.errors import NonFiniteWeights

_FORMATS = {"F16": (2, 10), "BF16": (2, 7), "F32": (4, 23), "F64": (8, 52)}  # bytes, mantissa bits


def scale_bytes(content: bytes | memoryview, dtype: str, factor: float) -> bytes | memoryview:
    """Little-endian floats, each multiplied by `factor` > 0 and rounded to nearest even.

    Equals torch's multiplication by a Python scalar bit for bit (a NaN stays some NaN). Raises
    NonFiniteWeights when a finite weight would become infinite.
    """
    if factor == 1.0 or not content:
        return content
    mantissa, exponent = math.frexp(factor)
    if mantissa == 0.5:
        return _shifted(content, dtype, exponent - 1)
    return _one_by_one(content, dtype, factor)


def constant_bytes(dtype: str, nbytes: int, value: float) -> bytes:
    """Little-endian floats that all are `value`, which the dtype must hold exactly."""
    if not value:
        return bytes(nbytes)
    size = _FORMATS[dtype][0]
    code = {"F16": "<e", "BF16": "<f", "F32": "<f", "F64": "<d"}[dtype]
    return struct.pack(code, value)[-size:] * (nbytes // size)


def widened(content: bytes | memoryview, dtype: str) -> bytes:
    """Little-endian F16 or BF16 as F32."""
    if dtype == "F16":
        values = array.array("f", struct.unpack(f"<{len(content) // 2}e", content))
        return _little(values)
    words = array.array("I", (word << 16 for word in _read("H", content)))
    return _little(words)


@dataclass(frozen=True)
class _Masks:
    """Constants for a chunk: one word pattern each, repeated over all words."""

    sign: int
    exponent: int
    mantissa: int
    mantissa_top: int  # the bit above the mantissa
    above_zero: int  # added to exponents, carries into the sign bit iff the exponent is above 0
    too_large: int  # the same iff the scaled exponent would reach infinity's
    large_enough: int  # the same iff the scaled exponent stays above 0
    step: int  # added to a word (or taken away), scales it


@functools.lru_cache(maxsize=16)
def _masks(words: int, dtype: str, step: int) -> _Masks:
    size, mantissa = _FORMATS[dtype]
    sign, unit = 1 << (8 * size - 1), 1 << mantissa
    infinity = sign - unit

    def repeat(word: int) -> int:
        return int.from_bytes(word.to_bytes(size, "little") * words, "little")

    return _Masks(
        sign=repeat(sign),
        exponent=repeat(infinity),
        mantissa=repeat(unit - 1),
        mantissa_top=repeat(unit),
        above_zero=repeat(sign - unit),
        too_large=repeat(sign - max(infinity - max(step, 0) * unit, 0)),
        large_enough=repeat(sign - (1 + max(-step, 0)) * unit),
        step=repeat(abs(step) * unit),
    )


@functools.lru_cache(maxsize=64)
def _plain_tops(dtype: str, step: int) -> bytes:
    """The highest bytes (sign and top of the exponent) whose words all take `step` as they are:
    neither they nor what they become is subnormal or infinite.
    """
    size, mantissa = _FORMATS[dtype]
    infinity = ((1 << (8 * size - 1)) >> mantissa) - 1
    below = 8 * (size - 1)
    plain = []
    for top in range(256):
        low = (top & 0x7F) << below >> mantissa
        high = ((top & 0x7F) << below | ((1 << below) - 1)) >> mantissa
        if min(low, low + step) >= 1 and max(high, high + step) < infinity:
            plain.append(top)
    return bytes(plain)


def _shifted(content: bytes | memoryview, dtype: str, step: int) -> bytes | memoryview:
    """All words times 2^step."""
    size, mantissa = _FORMATS[dtype]
    if abs(step) >= 1 << (8 * size - 2 - mantissa):
        return _one_by_one(content, dtype, 2.0**step)
    masks = _masks(len(content) // size, dtype, step)
    number = int.from_bytes(content, "little")
    if not bytes(content)[size - 1 :: size].translate(None, _plain_tops(dtype, step)):
        scaled = number + masks.step if step > 0 else number - masks.step
        return scaled.to_bytes(len(content), "little")
    exponent = number & masks.exponent
    normal = (exponent + masks.above_zero) & masks.sign
    special = (exponent + masks.too_large) & masks.sign
    if step < 0:
        special |= normal & ~(exponent + masks.large_enough)
    if normal != masks.sign:
        filled = ((number & masks.mantissa) + masks.mantissa) & masks.mantissa_top
        special |= (filled << (8 * size - 1 - mantissa)) & (normal ^ masks.sign)
    # Words that are special get nothing added here, so that no carry can leave them.
    plain = normal & ~special
    change = (plain >> (8 * size - 1)) * (abs(step) << mantissa)
    scaled = number + change if step > 0 else number - change
    result = scaled.to_bytes(len(content), "little")
    return result if not special else _patched(result, special, dtype, 2.0**step)


def _patched(scaled: bytes, special: int, dtype: str, factor: float) -> memoryview:
    """`scaled` with the words marked in `special` multiplied one by one."""
    size, _ = _FORMATS[dtype]
    patched = bytearray(scaled)
    marks = special.to_bytes(len(scaled), "little")
    for match in re.finditer(rb"[^\x00]", marks):
        start = match.start() + 1 - size
        patched[start : start + size] = _one_by_one(scaled[start : start + size], dtype, factor)
    return memoryview(patched)


def _one_by_one(content: bytes | memoryview, dtype: str, factor: float) -> bytes:
    size, _ = _FORMATS[dtype]
    narrow = factor if size == 8 else struct.unpack("f", struct.pack("f", factor))[0]
    if size == 2:
        words = _read("H", content)
        scaled = array.array("H", [_scaled_word(word, dtype, narrow) for word in words])
        return _little(scaled)
    kind = "f" if size == 4 else "d"
    values = _read(kind, content)
    products = array.array(kind, [value * narrow for value in values])
    if not math.isfinite(math.fsum(map(abs, products))) and any(
        math.isinf(product) and math.isfinite(value)
        for product, value in zip(products, values, strict=True)
    ):
        raise out_of_range(dtype, factor)
    return _little(products)


@functools.lru_cache(maxsize=1 << 17)
def _scaled_word(word: int, dtype: str, factor: float) -> int:
    """A 16-bit float times a float32: the product in float32, then rounded, as torch does."""
    if dtype == "F16":
        (value,) = struct.unpack("<e", struct.pack("<H", word))
    else:
        (value,) = struct.unpack("<f", struct.pack("<I", word << 16))
    if not math.isfinite(value):
        return word
    try:
        (product,) = struct.unpack("<f", struct.pack("<f", value * factor))
        if dtype == "F16":
            return int.from_bytes(struct.pack("<e", product), "little")
    except OverflowError:
        raise out_of_range(dtype, factor) from None
    (bits,) = struct.unpack("<I", struct.pack("<f", product))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    if rounded & 0x7F80 == 0x7F80:
        raise out_of_range(dtype, factor)
    return int(rounded)


def out_of_range(dtype: str, factor: float) -> NonFiniteWeights:
    """The error of a weight that `factor` would make infinite."""
    return NonFiniteWeights(
        f"a weight times {factor:g} leaves the range of {dtype}",
        hint="Convert to a wider dtype (bfloat16 or float32), or upcycle with preserve='none'.",
    )


def _read(kind: str, content: bytes | memoryview) -> array.array[Any]:
    values: array.array[Any] = array.array(kind)
    values.frombytes(content)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _little(values: array.array[Any]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
