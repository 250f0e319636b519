"""Small models and batches for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moezoo

TINY = moezoo.SwitchConfig(
    vocab_size=61,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_heads=2,
    num_layers=2,
    num_experts=4,
    dropout_rate=0.0,
)


def tiny(task: str = "conditional_generation", **overrides: Any) -> torch.nn.Module:
    """A tiny Switch model with weights large enough for logits of order one."""
    model = moezoo.build(TINY, task=task, seed=0, **overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(0.3 * noise)
    return model


def source(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, TINY.vocab_size, (batch, length), generator=generator)
