"""Checks and small transformations of what callers pass to a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, DtypeError, ShapeError
from moezoo.models.cache import DecoderCache

IGNORED = -100


def embedded(
    table: nn.Embedding,
    ids: Tensor | None,
    embeds: Tensor | None,
    mask: Tensor | None,
    name: str,
) -> Tensor:
    """Embeddings (B, L, D) of ids (B, L), or the given ones with their padding zeroed."""
    embeds_name = name.replace("input_ids", "inputs_embeds")
    if (ids is None) == (embeds is None):
        found = "neither" if ids is None else "both"
        reason = f"pass {name} or {embeds_name}"
        raise ConfigError(reason, field=name, expected="exactly one", found=found)
    if ids is not None:
        check_ids(ids, table.num_embeddings, name)
        return table(ids)  # type: ignore[no-any-return]
    assert embeds is not None
    if embeds.dim() != 3 or embeds.shape[2] != table.embedding_dim:
        wanted = f"(B, L, {table.embedding_dim})"
        found_shape = tuple(embeds.shape)
        raise ShapeError(
            f"{embeds_name} has the wrong shape",
            field=embeds_name,
            expected=wanted,
            found=found_shape,
        )
    if mask is None or mask.shape != embeds.shape[:2]:
        return embeds
    return torch.where(mask.bool()[:, :, None], embeds, embeds.new_zeros(()))


def check_ids(ids: Tensor, vocab_size: int, name: str) -> None:
    """Refuse ids that are not (B, L) integers in [0, vocab_size).

    The range is checked where reading it costs nothing; on other devices the embedding does.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DtypeError(f"{name} must be integers", field=name, found=ids.dtype)
    if ids.dim() != 2:
        raise ShapeError(
            f"{name} has the wrong shape", field=name, expected="(B, L)", found=tuple(ids.shape)
        )
    _check_range(ids, 0, vocab_size, name)


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Refuse labels that are not (B, L) integers in [0, vocab_size) or -100."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DtypeError("labels must be integers", field="labels", found=labels.dtype)
    if labels.dim() != 2:
        found = tuple(labels.shape)
        raise ShapeError(
            "labels have the wrong shape", field="labels", expected="(B, L)", found=found
        )
    _check_range(torch.where(labels == IGNORED, 0, labels), 0, vocab_size, "labels")


def check_mask(
    mask: Tensor | None, x: Tensor, name: str, cache: DecoderCache | None = None
) -> None:
    """Refuse a mask that does not fit x (B, L, D) and the cached positions before it."""
    if mask is None:
        return
    wanted = (x.shape[0], x.shape[1] + (0 if cache is None else cache.length))
    if tuple(mask.shape) != wanted:
        found = tuple(mask.shape)
        raise ShapeError(f"{name} has the wrong shape", field=name, expected=wanted, found=found)
    if mask.is_floating_point() or mask.is_complex():
        hint = "Pass 1 or True for real tokens, 0 or False for padding."
        raise DtypeError(f"{name} must be bool or integer", field=name, found=mask.dtype, hint=hint)


def shifted_right(labels: Tensor, config: SwitchConfig) -> Tensor:
    """Decoder input (B, L): the start token, then the labels but the last; -100 becomes padding."""
    shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return torch.where(shifted == IGNORED, config.pad_token_id, shifted)


def _check_range(ids: Tensor, low: int, high: int, name: str) -> None:
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(ids))
    if smallest < low or largest >= high:
        bad = smallest if smallest < low else largest
        hint = "The tokenizer does not fit the model."
        raise ConfigError(
            f"{name} holds an id out of range",
            field=name,
            expected=f"{low} to {high - 1}",
            found=bad,
            hint=hint,
        )
