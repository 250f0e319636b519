"""Tiny models to plug mixtures into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moezoo
from moezoo.adapters.sparse import sparse

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1}


T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2}


def ids(seed: int = 0) -> Tensor:
    return torch.randint(2, 50, (2, 6), generator=torch.Generator().manual_seed(seed))


def lively(model: nn.Module) -> nn.Module:
    """Weights large enough that the MLPs matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def hugging_face(kind: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return lively(getattr(transformers, kind)(getattr(transformers, config)(**options)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Mine(nn.Module):
    """A model of one's own; `how` it recomputes its blocks."""

    def __init__(self, how: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.how = how

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            if self.how is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.how)
        return x


def mine(how: bool | None = None, **options: Any) -> Mine:
    torch.manual_seed(0)
    model = Mine(how)
    moezoo.plug(
        model, "blocks.*.mlp", sparse(4, capacity={"name": "first_come", "limit": 1}), **options
    )
    return model


def reals(model: nn.Module, *arguments: Any, **named: Any) -> list[Tensor | None]:
    with torch.no_grad(), moezoo.record(model) as tape:
        model(*arguments, **named)
    return [routing.real for calls in tape.by_layer.values() for routing in calls]
