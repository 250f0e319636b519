"""Readers of checkpoint containers, each opened by `open_source`. No torch on import."""

from __future__ import annotations

from moezoo.adapters.formats.base import DTYPE_BITS, Source, TensorInfo
from moezoo.adapters.formats.detect import open_source

__all__ = ["DTYPE_BITS", "Source", "TensorInfo", "open_source"]
