"""Initial weights of a wrapped model, module by module, as transformers asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moezoo.component import Component, owns_tensors


@torch.no_grad()
def draw(module: nn.Module) -> None:
    """Give a module's own tensors, without its children's, their initial values; those that were
    loaded stay.
    """
    if not owns_tensors(module):
        return
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    loaded = [t for t in own if getattr(t, "_is_hf_initialized", False)]
    kept = [tensor.clone() for tensor in loaded]
    initial: Any = getattr(module, "initial", None)
    if type(module) is nn.Linear and initial is not None:
        initial(module.weight)
    else:
        reset: Any = module.reset_own if isinstance(module, Component) else module.reset_parameters
        reset()
    for tensor, before in zip(loaded, kept, strict=True):
        tensor.copy_(before)
