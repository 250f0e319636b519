"""Registered ways to make experts and routers out of a dense model, shared by the live and the
streaming conversion. Importing this loads no torch.
"""

from __future__ import annotations

from moezoo.adapters.upcycle.inits import (  # noqa: F401  (importing registers)
    branches,
    copy,
    drop,
    lora,
    noise,
    split,
    virtual_group,
)
from moezoo.adapters.upcycle.inits.base import ExpertInit, Matrices, expert_inits, slices_of
from moezoo.adapters.upcycle.inits.routers import RouterInit, router_inits

__all__ = [
    "ExpertInit",
    "Matrices",
    "RouterInit",
    "expert_inits",
    "router_inits",
    "slices_of",
]
