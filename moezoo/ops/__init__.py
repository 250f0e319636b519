"""Operators on the hot path."""

from moezoo.ops.grouped_linear import grouped_linear

__all__ = ["grouped_linear"]
