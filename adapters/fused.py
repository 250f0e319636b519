"""Tensors that hold a matrix of every expert, seen as one tensor each. No torch.

A part is called `WHOLE[expert:part/parts]`; parts lie one after the other, so each is a range of
bytes of its whole. Reading and writing know parts alone; the header of a file knows wholes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from moezoo.adapters.formats.base import Source, TensorInfo
from moezoo.adapters.formats.files import quoted
from moezoo.errors import TensorMismatch

_PART = re.compile(r"(.+)\[(\d+):(\d+)/(\d+)\]\Z")


class Place(NamedTuple):
    """A part of a whole: the how-manieth, and how many make an expert."""

    whole: str
    number: int
    parts: int


def part_name(whole: str, expert: int, part: int = 0, parts: int = 1) -> str:
    """What a part is called."""
    return f"{whole}[{expert}:{part}/{parts}]"


def place_of(name: str) -> Place | None:
    """Where a part belongs; None for a tensor of its own."""
    match = _PART.match(name)
    if match is None:
        return None
    parts = int(match[4])
    return Place(match[1], int(match[2]) * parts + int(match[3]), parts)


def whole_name(name: str) -> str:
    """The tensor of the file that holds a tensor: its whole, or itself."""
    place = place_of(name)
    return name if place is None else place.whole


def split_fused(source: Source, wholes: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
    """Let a source have the parts (rows, columns) of each whole in its place.

    Args:
        wholes: in how many parts of an expert each is, and its shape (E, parts * rows, columns).

    Raises TensorMismatch for a whole that is missing or of another shape, or in a container that
    holds no plain bytes.
    """
    for name, (_, shape) in wholes.items():
        info = source.info(name)
        if info.shape != shape:
            raise TensorMismatch(
                f"{quoted(name)} has the wrong shape", path=source.path, key=name,
                expected=list(shape), found=list(info.shape),
            )  # fmt: skip
        if info.path is None:
            raise TensorMismatch(
                f"{quoted(name)} holds all experts, which only safetensors lets be read apart",
                path=source.path, key=name, hint="Save it as safetensors, with transformers.",
            )  # fmt: skip
    found: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        if name in wholes:
            found |= {part.name: part for part in _parts(info, wholes[name][0])}
        else:
            found[name] = info
    source.tensors = found


def _parts(info: TensorInfo, parts: int) -> Iterator[TensorInfo]:
    count, rows, columns = info.shape
    shape, size = (rows // parts, columns), info.nbytes // (count * parts)
    for index in range(count * parts):
        expert, part = divmod(index, parts)
        name = part_name(info.name, expert, part, parts)
        yield replace(info, name=name, shape=shape, offset=info.offset + index * size)
