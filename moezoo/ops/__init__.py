"""Operators on the hot path."""

from moezoo.ops.grouped_linear import grouped_linear
from moezoo.ops.memory import release_memory

__all__ = ["grouped_linear", "release_memory"]
