"""Finding NaN and infinity in weights that are still bytes, at memory speed and without torch."""

from __future__ import annotations

import re
import struct

from moezoo.adapters.formats.files import quoted
from moezoo.errors import NonFiniteWeights

# The highest byte of a little-endian float holds the sign and the top of the exponent; only these
# values of it can belong to NaN or infinity. Weights practically never have them.
_SUSPECT = {
    "F16": (2, re.compile(rb"[\x7c-\x7f\xfc-\xff]")),
    "BF16": (2, re.compile(rb"[\x7f\xff]")),
    "F32": (4, re.compile(rb"[\x7f\xff]")),
    "F64": (8, re.compile(rb"[\x7f\xff]")),
}
_LIMIT = {"F16": (0x7C00, "<H"), "BF16": (0x7F80, "<H"), "F32": (0x7F800000, "<I")}
_LIMIT["F64"] = (0x7FF0000000000000, "<Q")


def check_finite(content: bytes | memoryview, dtype: str, name: str, path: object) -> None:
    """Raise NonFiniteWeights when a chunk of floats holds NaN or infinity."""
    size, suspect = _SUSPECT[dtype]
    for match in suspect.finditer(bytes(content[size - 1 :: size])):
        start = match.start() * size
        field, kind = _LIMIT[dtype]
        (word,) = struct.unpack(kind, content[start : start + size])
        if word & field == field:
            raise NonFiniteWeights(
                f"{quoted(name)} holds NaN or infinity",
                path=path,
                key=name,
                hint="The checkpoint is broken; to convert it all the same, allow nonfinite.",
            )
