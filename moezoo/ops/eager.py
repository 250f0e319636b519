"""Where an operator's gradient may be written by hand, and the host may look at a value."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_eager() -> bool:
    """Whether operators run at once, on plain tensors: neither traced by `torch.compile`,
    `torch.export` and `torch.jit.trace` nor transformed by `torch.func` or differentiated forward,
    which see through operators of torch alone.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    return torch._C._get_tracing_state() is None and not is_transformed()


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, such as `grad`, is active outside tracing."""
    if torch.compiler.is_compiling():
        return False
    active: bool = torch._C._are_functorch_transforms_active()
    return active
