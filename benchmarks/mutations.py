"""Mutations of sound files: of their bytes, of JSON, and of a safetensors header."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0xC1, 0xDD, 0xDF, 0xC6, 0xC9, 0x22, 0x7B, 0x5B, 0x2E)
_NUMBERS = (0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5,
            -0.0, 1e308, 1e-320, float("inf"), float("nan"))  # fmt: skip
_TEXTS = ("", "\0", "..", "/", "../../etc/passwd", "/dev/zero", "shared.weight", "encoder",
          "model_type", "F32", "BF16", "C64", "gzip", "t5", "longt5", "switch_transformers",
          "moezoo", "gated-gelu", "\ud800", "x" * 300, "é\n", "encoder.block.0.layer.0",
          "encoder.block.99999.layer.0.layer_norm.weight")  # fmt: skip
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1, 2, 3], {"a": 1}, [None], [0] * 40)


def bytes_mutated(content: bytes, chance: random.Random) -> bytes:
    """One to four changes of bytes; most at the beginning, where headers are."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if not changed:
            break
        reach = len(changed) if chance.random() < 0.5 else min(len(changed), 512)
        _change(changed, chance.randrange(reach), chance)
    return bytes(changed)


def _change(content: bytearray, place: int, chance: random.Random) -> None:
    kind = chance.randrange(8)
    length = chance.choice((1, 1, 2, 4, 8, 32, 200))
    if kind == 0:
        content[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        content[place] = chance.choice(_BYTES)
    elif kind == 2:
        content[place] = chance.randrange(256)
    elif kind == 3:
        content[place:place] = chance.randbytes(length)
    elif kind == 4:
        del content[place : place + length]
    elif kind == 5:
        content[place:place] = content[place : place + length]
    elif kind == 6:
        number = chance.choice((0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
        order = chance.choice("<>")
        packed = struct.pack(f"{order}Q", number)
        wide = packed if chance.random() < 0.5 else packed[:4] if order == "<" else packed[4:]
        content[place : place + len(wide)] = wide
    else:
        del content[place:]


def json_mutated(content: bytes, chance: random.Random) -> bytes:
    """A third of bytes, two thirds of values: replaced, removed, renamed, nested or repeated."""
    if chance.random() < 0.33:
        return bytes_mutated(content, chance)
    values = json.loads(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        values = _edited(values, chance)
    text = json.dumps(values, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.02:
        text = text.replace("0", chance.choice(("9" * 5000, "[" * 3000 + "]" * 3000)), 1)
    return text.encode("utf-8", "surrogatepass")


def safetensors_mutated(content: bytes, chance: random.Random) -> bytes:
    """The JSON header mutated, mostly with the length that belongs to it, or the whole file."""
    if chance.random() < 0.25:
        return bytes_mutated(content, chance)
    (length,) = struct.unpack("<Q", content[:8])
    header = json_mutated(content[8 : 8 + length].rstrip(), chance)
    told = len(header) if chance.random() < 0.95 else chance.randrange(2**64)
    return struct.pack("<Q", told) + header + content[8 + length :]


def ocdbt_mutated(content: bytes, chance: random.Random) -> bytes:
    """Bytes after the first 12 changed, mostly with the length and checksum that belong to them."""
    if chance.random() < 0.25:
        return bytes_mutated(content, chance)
    body = content[:4] + bytes(8) + bytes_mutated(content[12:-4], chance)
    told = body[:4] + struct.pack("<Q", len(body) + 4) + body[12:]
    return told + struct.pack("<I", _crc32c(told))


def _crc32c(content: bytes) -> int:
    """The checksum of OCDBT: CRC-32 with Castagnoli's polynomial."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = (crc >> 8) ^ _CASTAGNOLI[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _castagnoli(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CASTAGNOLI = [_castagnoli(byte) for byte in range(256)]


def _edited(value: Any, chance: random.Random) -> Any:
    """`value` with one place in it changed."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.05:
        return _replacement(value, chance)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = chance.choice(keys)
    if chance.random() < 0.7:
        value[key] = _edited(value[key], chance)
        return value
    kind = chance.randrange(4)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[chance.choice(_TEXTS)] = value.pop(key)
    elif kind == 2:
        value[key] = _deep(value[key], chance.choice((1, 3, 20)))
    elif isinstance(value, dict):
        value[chance.choice(_TEXTS)] = _replacement(value[key], chance)
    else:
        value.append(_replacement(value[key], chance))
    return value


def _replacement(value: Any, chance: random.Random) -> Any:
    if isinstance(value, int) and chance.random() < 0.4:
        return value + chance.choice((-8, -4, -1, 1, 4, 8, 1000)) * chance.choice(
            (1, 1, value or 1)
        )
    return copy.deepcopy(chance.choice(chance.choice((_NUMBERS, _TEXTS, _OTHERS))))


def _deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value
