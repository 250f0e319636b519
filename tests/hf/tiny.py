"""A tiny model of the zoo and its wrapper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moezoo
from moezoo.adapters.hf import MoezooForConditionalGeneration
from moezoo.config import SwitchConfig

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_experts": 4,
    "initializer_scale": 0.1,  # with the factor on the decoder below: answers of order one
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
}


def wrapped(**fields: Any) -> Any:
    """A wrapped model whose answers depend on its input."""
    model = moezoo.build(SwitchConfig(**{**SIZES, **fields}), seed=0)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return MoezooForConditionalGeneration.wrap(model)


def batch(rows: int = 3) -> dict[str, Tensor]:
    """Sources and targets, some of them padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (rows, 7), generator=generator)
    labels = torch.randint(2, VOCABULARY, (rows, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    labels[0, 3:] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
