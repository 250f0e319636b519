"""How a model lies over many GPUs, reckoned before anything runs: memory, bytes on the wire and
time of every layout of experts and dense weights. Imports no torch for plain models.
"""

from moezoo.layouts.activations import Batch, Kept, activations
from moezoo.layouts.figures import Layout, Memory, Time, Wire
from moezoo.layouts.machine import Machine
from moezoo.layouts.planner import layout, plan, span

__all__ = [
    "Batch",
    "Kept",
    "Layout",
    "Machine",
    "Memory",
    "Time",
    "Wire",
    "activations",
    "layout",
    "plan",
    "span",
]
