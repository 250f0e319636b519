"""The same model in another layout or dtype, or one of its experts as a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moezoo.adapters.checkpoint_source import CheckpointSource, open_checkpoint
from moezoo.adapters.families import DecoderConfig, Family, ModelConfig, layout_for
from moezoo.adapters.families.decoders import constant_of
from moezoo.adapters.formats import TensorInfo, open_source
from moezoo.adapters.formats.base import tensor_bytes
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.adapters.upcycle.downcycling import (
    dense_config,
    known_scale,
    slices_of,
    upcycled_scale,
)
from moezoo.adapters.upcycle.drawing import cast
from moezoo.adapters.upcycle.folding import FOLD, fold_factor, folded_config
from moezoo.adapters.upcycle.recipe import DTYPES
from moezoo.adapters.upcycle.rewrite import Output, rewrite
from moezoo.adapters.upcycle.tables import ROWS_OF_TOKENS, Step, resized_output, same_table
from moezoo.config import SwitchConfig
from moezoo.dtypes import dtype_word
from moezoo.errors import CheckpointError, ConfigError


def export(
    path: str | Path,
    out: str | Path,
    *,
    layout: str = "auto",
    dtype: str | None = None,
    expert: int | None = None,
    wo_scale: float | None = None,
    vocab_size: int | None = None,
    fold: bool = False,
    drop_heads: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Path:
    """Write a checkpoint anew: any container in, safetensors out.

    Args:
        layout: "auto", "huggingface" or "moezoo".
        dtype: "float32", "bfloat16", "float16", or None to keep it.
        expert: the number of an expert; a dense model with that expert in every sparse layer is
            written, the factor of the upcycling on `wo` undone.
        wo_scale: that factor; None: from the provenance, and without one the number of experts, as
            an exact upcycling has it. 1 takes an expert as it is.
        vocab_size: rows of every table of tokens and of the head: the first ones are kept as they
            are, new ones are their mean, and what was written is compared before it is put in
            place.
        fold: put a model of unit weight into the words of transformers' Switch, which weighs by
            probability: not exact, see `folding.FOLD`.
        drop_heads: leave out heads that moezoo's models do not have, such as a classifier's.

    Raises ConfigError for a layout that cannot hold the model, or an expert that it has not.
    """
    dtype = None if dtype is None else dtype_word(dtype, tuple(DTYPES))
    _check(wo_scale, vocab_size)
    with open_checkpoint(path, drop_heads=drop_heads) as checkpoint:
        config = checkpoint.config.replace(wo_scale=known_scale(checkpoint))
        if fold:
            config = _folded(config, expert)
        if expert is not None:
            _refuse_part(checkpoint)
            config = dense_config(checkpoint)
            if not 0 <= expert < checkpoint.config.num_experts:
                raise ConfigError(
                    "there is no such expert",
                    field="expert",
                    expected=f"0 to {checkpoint.config.num_experts - 1}",
                    found=expert,
                )
        if vocab_size is not None:
            _refuse_lost_ids(config, vocab_size)
            config = config.replace(vocab_size=vocab_size)
        wanted = None if dtype is None else DTYPES[dtype]
        family = layout_for(config, layout, dtypes={wanted} if wanted else checkpoint.dtypes)
        operation: dict[str, Any] = {"operation": "export", "expert": expert, "dtype": dtype}
        operation |= {} if vocab_size is None else {"vocab_size": vocab_size}
        operation |= {"fold": FOLD} if fold else {}
        return rewrite(
            checkpoint,
            out,
            list(_outputs(checkpoint, family, wanted, expert, wo_scale, vocab_size, fold)),
            config=config,
            family=family,
            operation=operation,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            max_shard_size=max_shard_size,
            check=None
            if vocab_size is None
            else partial(_check_tables, checkpoint, (wanted, vocab_size)),
        )


def _folded(config: ModelConfig, expert: int | None) -> ModelConfig:
    if expert is not None:
        hint = "Leave fold out."
        raise ConfigError("one expert has no router to fold", field="fold", hint=hint)
    if not isinstance(config, SwitchConfig):
        raise ConfigError("only a Switch can be folded", field="fold", hint="Leave fold out.")
    return folded_config(config)


def _refuse_part(checkpoint: CheckpointSource) -> None:
    """One expert is no layer where every token passes another besides, nor where it is a slice."""
    config = checkpoint.config
    if isinstance(config, DecoderConfig) and config.shares:
        raise ConfigError(
            f"{config.model_type} adds what all tokens pass to what an expert gives",
            field="expert", path=checkpoint.path,
            hint="`moezoo downcycle` gives the dense model of one that was not trained.",
        )  # fmt: skip
    if (slices := slices_of(checkpoint)) > 1:
        raise ConfigError(
            f"an expert is one of {slices} slices of a dense layer", field="expert",
            path=checkpoint.path, hint="`moezoo downcycle` joins them.",
        )  # fmt: skip


def _refuse_lost_ids(config: ModelConfig, vocab_size: int) -> None:
    """A SwitchConfig knows its special ids; transformers makes no decoder that pads with no row."""
    if not isinstance(config, DecoderConfig):
        return
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        found = config.full.get(name)
        for number in found if isinstance(found, tuple) else [found]:
            if type(number) is int and number >= vocab_size:
                raise ConfigError(
                    f"{name} would have no row", field="vocab_size", expected=f"> {number}",
                    found=vocab_size, hint="Keep more rows, or change it in config.json first.",
                )  # fmt: skip


def _check(wo_scale: float | None, vocab_size: int | None) -> None:
    if vocab_size is not None:
        from moezoo.models.resizing import check_vocab_size

        check_vocab_size(vocab_size)
    if wo_scale is not None and not 0 < wo_scale < 1e9:
        raise ConfigError("no factor", field="wo_scale", expected="> 0", found=wo_scale)


def _outputs(
    checkpoint: CheckpointSource,
    family: Family,
    dtype: str | None,
    expert: int | None,
    wo_scale: float | None,
    vocab_size: int | None,
    fold: bool,
) -> Iterator[Output]:
    scale = 1.0 if expert is None else wo_scale or upcycled_scale(checkpoint)
    for name, parts in checkpoint.tensors.items():
        if expert is not None and (".mlp.router." in name or constant_of(checkpoint.config, name)):
            continue
        if expert is not None and ".mlp.experts." in name:
            matrix = name.rpartition(".")[2]
            layer = name.rpartition(".experts.")[0]
            (target,) = family.disk_names(f"{layer}.{matrix}.weight")
            undo = 1.0 / scale if matrix == "wo" else 1.0
            yield _output(checkpoint, target, parts[expert], dtype, undo)
            continue
        targets = family.disk_names(name, num_experts=len(parts))
        if vocab_size is not None and name in ROWS_OF_TOKENS:
            made = dtype or parts[0].dtype
            yield resized_output(checkpoint.source, parts[0], targets[0], made, vocab_size)
            continue
        factor = fold_factor(name, len(parts)) if fold else 1.0
        for target, part in zip(targets, parts, strict=True):
            yield _output(checkpoint, target, part, dtype, factor)


def _check_tables(checkpoint: CheckpointSource, step: Step, stage: Path) -> None:
    """Read what was written once more. Raises CheckpointError for a table that is not as it must
    be.
    """
    with open_source(stage) as made:
        for name in ROWS_OF_TOKENS:
            for info in checkpoint.tensors.get(name, ()):
                (written,) = checkpoint.description.family.disk_names(name)
                if not same_table(checkpoint.source, info, made, written, [step]):
                    reason = f"{name} does not read back as it was written"
                    raise CheckpointError(reason, path=stage, key=name, hint="Check the disk.")


def _output(
    checkpoint: CheckpointSource, target: str, info: TensorInfo, dtype: str | None, scale: float
) -> Output:
    plan = TensorPlan(target, dtype or info.dtype, info.shape)
    if plan.dtype == info.dtype:
        return Output(plan, info, scale)
    return Output(plan, make=partial(_cast, checkpoint, info, plan.dtype, scale))


def _cast(checkpoint: CheckpointSource, info: TensorInfo, dtype: str, scale: float) -> memoryview:
    tensor = checkpoint.source.tensor(info.name)
    scaled = tensor if scale == 1.0 else tensor * scale
    return tensor_bytes(cast(scaled, dtype, info.name))
