"""Another vocabulary for a model: more rows in every table of tokens and in the head, or fewer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from moezoo.errors import ConfigError
from moezoo.functional.shards import refuse_sharded
from moezoo.models.embedding import Embedding
from moezoo.models.linear import Linear
from moezoo.models.switch import SwitchEncoderModel, SwitchModel
from moezoo.routers.base import Router

BLOCK_BYTES = 1 << 20  # of a table that are read at a time
_MODELS = (SwitchModel, SwitchEncoderModel)


@torch.no_grad()
def resize_embeddings(model: nn.Module, vocab_size: int) -> nn.Module:
    """Give a live model's tables of tokens, and a head of its own, `vocab_size` rows, in place.

    Old rows stay as they are, bit for bit; rows beyond `vocab_size` go. A new row is the mean of
    the old ones, so that no new token is likelier than the likeliest old one and what the model
    says of old tokens stays in proportion (transformers draws around the same mean). The new
    parameters are other objects than the old: make the optimizer afterwards.

    Args:
        model: a moezoo model of any task, not quantised.

    Returns:
        The model.

    Raises ConfigError for another module, for a size that leaves a special id without a row, and
    for routers that know the vocabulary.
    """
    if not isinstance(model, _MODELS):
        found = type(model).__name__
        raise ConfigError("only moezoo models can be resized", field="model", found=found)
    refuse_sharded(model, "resizing")
    check_vocab_size(vocab_size)
    config = model.config.replace(vocab_size=vocab_size)
    check_routers(model)
    made = {name: _resized(module, vocab_size) for name, module in _tables(model)}
    for name, module in made.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)
    model.config = config
    return model


def check_vocab_size(vocab_size: int) -> None:
    """Raise ConfigError for what is no number of rows."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ConfigError(
            "vocab_size is a whole number >= 1", field="vocab_size", found=repr(vocab_size)[:80]
        )


def check_routers(model: nn.Module) -> None:
    """Raise ConfigError for a model with routers that know its vocabulary."""
    for name, module in model.named_modules():
        if isinstance(module, Router) and hasattr(module, "vocab_size"):
            reason = f"{name} routes by token id and knows the old vocabulary"
            raise ConfigError(reason, field="vocab_size", hint="Build a model of the new size.")


def mean_row(blocks: Iterable[Tensor]) -> Tensor:
    """The mean (D,) float64 of rows that come in blocks (N, D)."""
    total, count = torch.zeros((), device="cpu"), 0
    for rows in blocks:
        total, count = total + rows.double().sum(0), count + rows.shape[0]
    return total / max(count, 1)


def block_rows(row_bytes: int) -> int:
    """How many rows of a table are a block: the same on disk and in memory, so that sums are."""
    return max(1, BLOCK_BYTES // max(row_bytes, 1))


def _tables(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules with a row for each token, by name. Raises ConfigError for one that is unknown,
    such as a quantised head.
    """
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    there = dict(model.named_modules(remove_duplicate=False))
    found = [(name, there[name]) for name in names if name in there]
    for name, module in found:
        if type(module) not in (Embedding, Linear):
            raise ConfigError(
                f"{name} is no table that can be resized",
                field=name,
                found=type(module).__name__,
                hint="Resize before moezoo.quantize, and before adapters are put in.",
            )
    return found


def _resized(module: nn.Module, vocab_size: int) -> nn.Module:
    """A table of tokens or a head with `vocab_size` rows, on the same device, in the same dtype."""
    old = module.get_parameter("weight")
    added = vocab_size - old.shape[0]
    weight = old[:vocab_size].clone()
    if added > 0:
        blocks = torch.split(old, block_rows(old.shape[1] * old.element_size()))
        row = mean_row(blocks).to(old.dtype)
        weight = torch.cat([weight, row.expand(added, -1)])
    made: nn.Module
    with torch.device("meta"):
        if isinstance(module, Embedding):
            made = Embedding(vocab_size, old.shape[1], std=module.std)
        else:
            made = Linear(old.shape[1], vocab_size)
            made.initial = cast(Linear, module).initial
    made.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    return made.train(module.training)
