"""Where an operator's gradient may be written by hand, and the host may look at a value."""

from __future__ import annotations

import torch

from moezoo.private_torch import is_differentiated_forward, is_traced_by_jit, is_within_func


def is_eager() -> bool:
    """Whether operators run at once, on plain tensors: neither traced by `torch.compile`,
    `torch.export` and `torch.jit.trace` nor transformed by `torch.func` or differentiated forward,
    which see through operators of torch alone.
    """
    if torch.compiler.is_compiling() or is_differentiated_forward():
        return False
    return not is_traced_by_jit() and not is_within_func()


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, such as `grad`, is active outside tracing."""
    return not torch.compiler.is_compiling() and is_within_func()
