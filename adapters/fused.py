"""Tensors that hold a matrix of every expert, or several matrices, seen as one tensor each. No
torch.

A part of experts is called `WHOLE[expert:part/parts]`, and one of several matrices, of any number
of rows each, `WHOLE[number/parts]`. Parts lie one after the other, so each is a range of bytes of
its whole. Reading and writing know parts alone; the header of a file knows wholes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from moezoo.adapters.formats.base import Source, TensorInfo
from moezoo.adapters.formats.files import quoted
from moezoo.errors import TensorMismatch

_PART = re.compile(r"(.+)\[(?:(\d+):)?(\d+)/(\d+)\]\Z")


class Place(NamedTuple):
    """A part of a whole: the how-manieth, how many make an expert, and whether it is of experts."""

    whole: str
    number: int
    parts: int
    of_experts: bool

    def before(self) -> list[str]:
        """The parts that lie before one of several matrices."""
        return [slice_name(self.whole, number, self.parts) for number in range(self.number)]


def part_name(whole: str, expert: int, part: int = 0, parts: int = 1) -> str:
    """What a part is called."""
    return f"{whole}[{expert}:{part}/{parts}]"


def slice_name(whole: str, number: int, parts: int) -> str:
    """What one of several matrices is called."""
    return f"{whole}[{number}/{parts}]"


def place_of(name: str) -> Place | None:
    """Where a part belongs; None for a tensor of its own."""
    match = _PART.match(name)
    if match is None:
        return None
    parts, expert = int(match[4]), int(match[2] or 0)
    return Place(match[1], expert * parts + int(match[3]), parts, match[2] is not None)


def whole_name(name: str) -> str:
    """The tensor of the file that holds a tensor: its whole, or itself."""
    place = place_of(name)
    return name if place is None else place.whole


class Whole(NamedTuple):
    """A tensor of the file: the rows of each part of an expert, or of each matrix, and its shape
    (E, all rows, columns) or (all rows, columns).
    """

    rows: tuple[int, ...]
    shape: tuple[int, ...]


def split_fused(source: Source, wholes: Mapping[str, Whole]) -> None:
    """Let a source have the parts (rows, columns) of each whole in its place.

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
                f"{quoted(name)} holds several matrices, which only safetensors lets be read apart",
                path=source.path, key=name, hint="Save it as safetensors, with transformers.",
            )  # fmt: skip
    found: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        if name in wholes:
            found |= {part.name: part for part in _parts(info, wholes[name].rows)}
        else:
            found[name] = info
    source.tensors = found


def _parts(info: TensorInfo, rows: tuple[int, ...]) -> Iterator[TensorInfo]:
    *experts, total, columns = info.shape
    row, offset = info.nbytes // (total * (experts[0] if experts else 1)), info.offset
    for expert in range(experts[0] if experts else 1):
        for part, count in enumerate(rows):
            name = part_name(info.name, expert, part, len(rows)) if experts else ""
            name = name or slice_name(info.name, part, len(rows))
            yield replace(info, name=name, shape=(count, columns), offset=offset)
            offset += count * row
