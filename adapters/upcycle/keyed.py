"""Random numbers keyed by seed and tensor name: the same whatever the order, threads or shards."""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, name: str) -> int:
    """A 63-bit seed that belongs to this tensor under this seed."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_normals(seed: int, name: str, count: int, std: float) -> array[float]:
    """`count` float32 draws from N(0, std^2), by Box and Muller, without torch."""
    uniform = random.Random(keyed_seed(seed, name)).random
    values = array("f")
    for _ in range((count + 1) // 2):
        radius = std * math.sqrt(-2.0 * math.log(1.0 - uniform()))
        angle = 2.0 * math.pi * uniform()
        values.append(radius * math.cos(angle))
        values.append(radius * math.sin(angle))
    return values[:count]


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the larger draws that are done in torch."""
    import torch

    return torch.Generator("cpu").manual_seed(keyed_seed(seed, name))
