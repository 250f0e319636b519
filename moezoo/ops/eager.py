"""Where an operator's gradient may be written by hand, and the host may look at a value."""

from __future__ import annotations

import torch


def is_eager() -> bool:
    """Whether operators run at once, on plain tensors: neither traced by `torch.compile` and
    `torch.export` nor transformed by `torch.func`, which differentiates only what it sees through.
    """
    return not torch.compiler.is_compiling() and not is_transformed()


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, such as `grad`, is active outside tracing."""
    if torch.compiler.is_compiling():
        return False
    active: bool = torch._C._are_functorch_transforms_active()
    return active
