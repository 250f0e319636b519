"""A reader of MessagePack, as Flax and t5x write it: bounded, and without code."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

_DEPTH = 64
_MAX_VALUES = 1 << 18  # the largest T5 has some thousand arrays; a refusal is to be quick
_MAX_TEXT = 1 << 16
_FIXED = {
    0xC0: None,
    0xC2: False,
    0xC3: True,
}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LENGTHS = {  # kind and width of the length that follows
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"),
    0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


@dataclass(frozen=True)
class Extension:
    """A value of a kind that MessagePack leaves to its users; `start` is its place in the bytes."""

    kind: int
    content: memoryview
    start: int


class Malformed(ValueError):
    """Bytes that are no MessagePack; the message is fit for an error about the file."""


def unpack(content: memoryview) -> Any:
    """The one value that `content` holds. Binary parts are views, nothing is copied.

    Raises Malformed.
    """
    reader = _Reader(content)
    value = reader.value(0)
    if reader.position != len(content):
        raise Malformed("bytes follow the last value")
    return value


class _Reader:
    def __init__(self, content: memoryview) -> None:
        self.content, self.position, self.values = content, 0, 0

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.content):
            raise Malformed("it ends in the middle of a value: truncated")
        part = self.content[self.position : end]
        self.position = end
        return part

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def value(self, depth: int) -> Any:
        if depth > _DEPTH:
            raise Malformed("nested too deeply")
        self.values += 1
        if self.values > _MAX_VALUES:
            raise Malformed(f"more than {_MAX_VALUES} values")
        first = self.take(1)[0]
        if first <= 0x7F:
            return first
        if first >= 0xE0:
            return first - 256
        if first <= 0x8F:
            return self.mapping(first & 0x0F, depth)
        if first <= 0x9F:
            return [self.value(depth + 1) for _ in range(first & 0x0F)]
        if first <= 0xBF:
            return self.text(first & 0x1F)
        if first in _FIXED:
            return _FIXED[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if 0xD4 <= first <= 0xD8:
            return self.extension(1 << (first - 0xD4))
        if first not in _LENGTHS:
            raise Malformed(f"byte {first:#04x} starts no value")
        kind, width = _LENGTHS[first]
        return self.long(kind, self.number(width), depth)

    def long(self, kind: str, length: int, depth: int) -> Any:
        if kind == "bin":
            return self.take(length)
        if kind == "str":
            return self.text(length)
        if kind == "ext":
            return self.extension(length)
        if length > len(self.content) - self.position:
            raise Malformed("a list is longer than the file: truncated")
        if kind == "map":
            return self.mapping(length, depth)
        return [self.value(depth + 1) for _ in range(length)]

    def mapping(self, length: int, depth: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int)) or key in values:
                raise Malformed("a key appears twice, or is neither text nor number")
            values[key] = self.value(depth + 1)
        return values

    def text(self, length: int) -> str:
        if length > _MAX_TEXT:
            raise Malformed(f"a text of {length} bytes")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise Malformed("a text is not UTF-8") from None

    def extension(self, length: int) -> Extension:
        kind = self.number(">b")
        start = self.position
        return Extension(kind, self.take(length), start)
