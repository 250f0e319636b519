"""GPUs and what joins them: how long numbers take from one to the others. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from moezoo.errors import ConfigError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Machine:
    """What layouts are compared on; the defaults are of an H100 with a card of 400 Gbit/s each.

    node: GPUs that a fast network joins. flops: of matrix products, per second, as reached.
    inside, beyond: bytes per second that a GPU moves to others of its node and, by its own card,
    to other nodes. bandwidth: of a GPU's memory. hop_inside, hop_beyond: seconds that a message
    takes at least. usable: the share of a GPU's memory that tensors may fill. context: bytes that
    CUDA and NCCL take for themselves.

    Raises ConfigError for a value that is not above 0.
    """

    node: int = 8
    flops: float = 600e12
    inside: float = 450e9
    beyond: float = 50e9
    bandwidth: float = 3e12
    hop_inside: float = 2e-6
    hop_beyond: float = 8e-6
    usable: float = 0.92
    context: int = 2 * 10**9

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                name, wanted = f"machine.{entry.name}", "a number above 0"
                raise ConfigError(f"bad {name}", field=name, expected=wanted, found=repr(value))
        if self.node != int(self.node) or self.usable > 1:
            reason = "machine.node is a whole number, machine.usable at most 1"
            raise ConfigError(reason, field="machine", found=f"{self.node!r} and {self.usable!r}")

    def gather(self, size: float, ranks: int, together: int) -> float:
        """Seconds until each of `ranks` has all `size` bytes, or, as long, until each has its sum
        of a part. `together` of the ranks share a node, and its cards.
        """
        if ranks == 1:
            return 0.0
        nodes = ranks / together
        within = size * (ranks - 1) / ranks / self.inside if together > 1 else 0.0
        across = size * (1 - 1 / nodes) / (together * self.beyond)
        hops = (ranks - nodes) * self.hop_inside + (nodes > 1) * nodes * self.hop_beyond
        return max(within, across) + hops

    def exchange(self, size: float, ranks: int) -> float:
        """Seconds of an all-to-all of `size` bytes per rank, equal parts for all of `ranks`."""
        if ranks == 1:
            return 0.0
        together = min(ranks, self.node)
        within = size * (together - 1) / ranks / self.inside
        across = size * (ranks - together) / ranks / self.beyond
        return max(within, across) + (self.hop_beyond if ranks > together else self.hop_inside)


def parsed_memory(memory: str | int) -> int:
    """Bytes of "80GB", "141 GB" or "79.6GiB"; a number is bytes. Raises ConfigError."""
    text = str(memory).strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text)
    unit = None if match is None else _UNITS.get(match[2])
    size = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if size < 1 or isinstance(memory, bool):
        wanted = 'a size such as "80GB" or "79.6GiB"'
        raise ConfigError("bad memory", field="memory", expected=wanted, found=repr(memory))
    return size
