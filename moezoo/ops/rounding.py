"""What torch was told about the precision of products."""

from __future__ import annotations

import torch


def rounds_float32() -> bool:
    """Whether torch may round the operands of products of float32 on a GPU to TF32.

    `torch.get_float32_matmul_precision` would say it too, but raises for whom the newer settings
    of `torch.backends` were used.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    return bool(setting == "tf32")
