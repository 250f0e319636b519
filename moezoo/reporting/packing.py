"""Numbers by the thousand inside JSON: base64 of little-endian integers, the narrowest that hold
them.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor

_TYPES = {"u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32}


def packed(values: Tensor, *, none: bool = False) -> str:
    """Whole numbers >= 0 of any shape as "u8:", "u16:" or "u32:" and base64.

    Args:
        none: -1 stands for a value that is missing; the largest number of the type then does.
    """
    highest = int(values.max()) + none if values.numel() else 0
    kind = next(name for name in _TYPES if highest <= _highest(name))
    filled = torch.where(values < 0, _highest(kind), values) if none else values
    return f"{kind}:{base64.b64encode(_bytes(filled, kind)).decode()}"


def packed_bits(values: Tensor) -> str:
    """Booleans as "bit:" and base64, eight in a byte, the first in its lowest bit."""
    flat = values.flatten()
    filled = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)
    weight = 2 ** torch.arange(8, device=flat.device)
    return f"bit:{base64.b64encode(_bytes((filled * weight).sum(1), 'u8')).decode()}"


def unpacked(text: str) -> list[int]:
    """What a packed text holds; a missing value is the largest number of its type."""
    kind, _, content = text.partition(":")
    raw = base64.b64decode(content)
    if kind == "bit":
        return [byte >> bit & 1 for byte in raw for bit in range(8)]
    width = int(kind[1:]) // 8
    return [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]


def _highest(kind: str) -> int:
    return int(2 ** int(kind[1:])) - 1


def _bytes(values: Tensor, kind: str) -> bytes:
    width = int(kind[1:]) // 8
    flat = values.flatten().long()
    parts = [(flat >> (8 * byte)) & 255 for byte in range(width)]  # little-endian on any machine
    return bytes(torch.stack(parts, 1).flatten().tolist())
