"""Initial weights: T5's scheme for dense models, the paper's smaller one for sparse models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moezoo.component import redraw
from moezoo.config import SwitchConfig
from moezoo.functional.drawn import FanIn

SWITCH_SCALE = 0.1


@torch.no_grad()
def initialize(model: nn.Module, config: SwitchConfig) -> None:
    """Draw every weight of a model; each module's own `reset_parameters` says how.

    Dense: N(0, f^2) embeddings, N(0, f^2 / fan-in) projections, queries smaller by sqrt(d_kv), as
    Mesh TensorFlow's T5 does. Sparse: truncated normals of variance 0.1 f^2 / fan-in (Switch
    Transformers, section 2.4: 0.1x is what makes large sparse models train). f is
    `initializer_factor`; routers start as they do alone.
    """
    dense = config.num_experts == 0
    scale = config.initializer_factor * (1.0 if dense else SWITCH_SCALE**0.5)
    for module in model.modules():
        initial = getattr(module, "initial", None)
        if isinstance(initial, FanIn):
            module.initial = replace(initial, scale=scale, truncated=not dense)  # type: ignore[assignment]
    for child in model.children():
        redraw(child)
