"""`moezoo.record`: models of moezoo, and of transformers where that is in use."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager

from torch import nn

from moezoo import recording


def record(model: nn.Module, *, checked: bool = False) -> AbstractContextManager[recording.Tape]:
    """`moezoo.recording.record`, which also sees the routers of transformers' sparse models:
    whoever has such a model has imported transformers, and else it is not imported here.
    """
    if "transformers" in sys.modules:
        importlib.import_module("moezoo.adapters.hf.routers")  # registers what reads them
    return recording.record(model, checked=checked)
