"""Tiny T5 checkpoints on disk for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
FAMILIES = {
    "t5": ("T5", {"feed_forward_proj": "relu"}),
    "t5_v1_1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


def dense_t5(
    path: Path, family: str = "t5", *, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """A dense T5 of random weights, saved by transformers; returns its directory."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    _enlarge(model)
    if not options.get("tie_word_embeddings", True):
        own_head(model)
    model.to(dtype).save_pretrained(path)
    (path / "spiece.model").write_bytes(b"\x00tokenizer bytes\xff\n")
    return path


def own_head(model: nn.Module) -> None:
    """Untie the head: transformers 5 ties that of a new model whatever its config says."""
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) * 0.3)


def encoder_only(path: Path) -> Path:
    """The encoder of a T5, saved by transformers."""
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**SIZES))
    _enlarge(model)
    model.save_pretrained(path)
    return path


def ids(batch: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _enlarge(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
