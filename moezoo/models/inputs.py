"""Checks and small transformations of what callers pass to a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, DtypeError, ShapeError
from moezoo.models.cache import DecoderCache
from moezoo.ops.eager import is_eager
from moezoo.ops.observed import is_observed

IGNORED = -100


def embedded(
    table: nn.Embedding, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, name: str
) -> Tensor:
    """Embeddings (B, L, D) of ids (B, L), or the given ones with their padding zeroed."""
    embeds_name = name.replace("input_ids", "inputs_embeds")
    if (ids is None) == (embeds is None):
        found = "neither" if ids is None else "both"
        reason = f"pass {name} or {embeds_name}"
        raise ConfigError(reason, field=name, expected="exactly one", found=found)
    if ids is not None:
        check_ids(ids, table.weight.shape[0], name)
        _check_table(ids, table, name)
        return table(ids.long())  # type: ignore[no-any-return]
    assert embeds is not None
    check_hidden(embeds, table.weight.shape[1], embeds_name)
    _check_table(embeds, table, embeds_name)
    if mask is None or mask.shape != embeds.shape[:2]:
        return embeds
    return torch.where(mask.bool()[:, :, None], embeds, embeds.new_zeros(()))


def check_ids(ids: Tensor, vocab_size: int, name: str) -> None:
    """Refuse ids that are not (B, L) integers in [0, vocab_size).

    The range is checked where reading it costs nothing; on other devices the embedding does.
    """
    _check_integers(ids, name)
    if ids.dim() != 2:
        raise ShapeError(
            f"{name} has the wrong shape", field=name, expected="(B, L)", found=tuple(ids.shape)
        )
    _check_range(ids, 0, vocab_size, name)


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Refuse labels that are not (B, L) integers in [0, vocab_size) or -100."""
    _check_integers(labels, "labels")
    if labels.dim() != 2:
        found = tuple(labels.shape)
        raise ShapeError(
            "labels have the wrong shape", field="labels", expected="(B, L)", found=found
        )
    _check_range(torch.where(labels == IGNORED, 0, labels), 0, vocab_size, "labels")


def check_hidden(x: Tensor, d_model: int, name: str) -> None:
    """Refuse hidden states that are not (B, L, d_model) floating."""
    _check_tensor(x, name)
    if x.dim() != 3 or x.shape[2] != d_model:
        found = tuple(x.shape)
        wanted = f"(B, L, {d_model})"
        raise ShapeError(f"{name} has the wrong shape", field=name, expected=wanted, found=found)
    if not x.is_floating_point():
        raise DtypeError(f"{name} must be floating", field=name, found=x.dtype)


def _check_table(x: Tensor, table: nn.Embedding, name: str) -> None:
    # Who observes the table may bring its weights over when it is called (offload).
    if not is_observed(table):
        check_device(x, table.weight, name)


def check_device(x: Tensor, weight: Tensor, name: str) -> None:
    """Refuse a tensor that is not where the weights are."""
    if x.device.type != weight.device.type:
        found = f"{name} on {x.device}, weights on {weight.device}"
        raise ConfigError("input and model are on different devices", field=name, found=found)


def check_batch(x: Tensor, rows: int, name: str, other: str) -> None:
    """Refuse a tensor whose batch differs from that of what it goes with."""
    if x.shape[0] != rows:
        reason = f"{name} and {other} have different batch sizes"
        raise ShapeError(reason, field=name, expected=rows, found=x.shape[0])


def real_tokens(
    mask: Tensor | None, x: Tensor, name: str, cache: DecoderCache | None = None
) -> Tensor | None:
    """A checked mask (B, Lk) as bool; None stays None.

    Raises ShapeError or DtypeError for a mask that does not fit x (B, L, D) and the cached
    positions before it.
    """
    if mask is None:
        return None
    _check_tensor(mask, name)
    wanted = (x.shape[0], x.shape[1] + (0 if cache is None else cache.length))
    if tuple(mask.shape) != wanted:
        found = tuple(mask.shape)
        raise ShapeError(f"{name} has the wrong shape", field=name, expected=wanted, found=found)
    if mask.is_floating_point() or mask.is_complex():
        hint = "Pass 1 or True for real tokens, 0 or False for padding."
        raise DtypeError(f"{name} must be bool or integer", field=name, found=mask.dtype, hint=hint)
    return mask.bool()


def shifted_right(labels: Tensor, config: SwitchConfig) -> Tensor:
    """Decoder input (B, L): the start token, then the labels but the last; -100 becomes padding."""
    shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return torch.where(shifted == IGNORED, config.pad_token_id, shifted)


def up_to_last_label(labels: Tensor) -> Tensor:
    """True (B, L) up to each row's last label.

    What lies behind is padding: no label and, attention being causal, no label's position needs it,
    so experts need not see it and router losses must not count it.
    """
    return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0


def _check_tensor(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        found = type(x).__name__
        raise DtypeError(f"{name} must be a tensor", field=name, found=found)


def _check_integers(ids: Tensor, name: str) -> None:
    _check_tensor(ids, name)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DtypeError(f"{name} must be integers", field=name, found=ids.dtype)


def _check_range(ids: Tensor, low: int, high: int, name: str) -> None:
    if ids.device.type != "cpu" or ids.numel() == 0 or not is_eager():
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
