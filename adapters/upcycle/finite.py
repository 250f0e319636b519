"""Finding NaN and infinity in weights that are still bytes, at memory speed and without torch."""

from __future__ import annotations

import mmap
import re
import struct

from moezoo.adapters.formats.files import quoted
from moezoo.errors import NonFiniteWeights

# The highest byte of a little-endian float holds the sign and the top of the exponent; only these
# values of it can belong to NaN or infinity. Weights practically never have them.
_HALF = tuple(bytes([value]) for value in (*range(0x7C, 0x80), *range(0xFC, 0x100)))
_WIDE = (b"\x7f", b"\xff")
_SUSPECT = {"F16": (2, _HALF), "BF16": (2, _WIDE), "F32": (4, _WIDE), "F64": (8, _WIDE)}
_LIMIT = {"F16": (0x7C00, "<H"), "BF16": (0x7F80, "<H"), "F32": (0x7F800000, "<I")}
_LIMIT["F64"] = (0x7FF0000000000000, "<Q")


def check_finite(
    content: bytes | memoryview | mmap.mmap, dtype: str, name: str, path: object
) -> None:
    """Raise NonFiniteWeights when a chunk of floats holds NaN or infinity."""
    size, suspects = _SUSPECT[dtype]
    # Views alone have no quick way to give every fourth byte.
    highest = (bytes(content) if isinstance(content, memoryview) else content)[size - 1 :: size]
    if not any(suspect in highest for suspect in suspects):
        return
    field, kind = _LIMIT[dtype]
    for match in re.finditer(b"[" + b"".join(suspects) + b"]", highest):
        start = match.start() * size
        (word,) = struct.unpack(kind, content[start : start + size])
        if word & field == field:
            raise NonFiniteWeights(
                f"{quoted(name)} holds NaN or infinity",
                path=path,
                key=name,
                hint="The checkpoint is broken; to convert it all the same, allow nonfinite.",
            )
