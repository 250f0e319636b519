"""A small tokenizer and text for the tests of this folder."""

from __future__ import annotations

import pydoc_data.topics
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

import moezoo


@cache
def tokenizer() -> moezoo.Tokenizer:
    """400 pieces learnt from a few topics."""
    topics: dict[str, str] = pydoc_data.topics.topics
    lines = [line for name in sorted(topics)[:30] for line in topics[name].splitlines() if line]
    return moezoo.Tokenizer.train(lines, Path(mkdtemp()) / "spiece.model", vocab_size=400)


def packed(count: int = 4000) -> torch.Tensor:
    """Ids of a topic."""
    topics: dict[str, str] = pydoc_data.topics.topics
    ids = tokenizer().encode(" ".join(topics[name] for name in sorted(topics)[30:40]))
    return torch.tensor(ids[:count], dtype=torch.int32)


def small_model(**overrides: object) -> torch.nn.Module:
    """A model that learns a little within a second."""
    config = moezoo.SwitchConfig(
        vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, num_experts=4,
        initializer_scale=0.1,  # its routers drop too little for a warning
    )  # fmt: skip
    return moezoo.build(config, seed=0, **overrides)
