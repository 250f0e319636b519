"""What a checkpoint on disk is: its family, config and where each tensor goes. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.adapters.families import (
    Family,
    T5Family,
    UMT5Family,
    Weights,
    family_of,
    long_t5_refusal,
)
from moezoo.adapters.families.fields import refuse_quantized
from moezoo.adapters.foreign import refuse_foreign_tensors
from moezoo.adapters.formats.base import Source
from moezoo.adapters.formats.files import read_json
from moezoo.adapters.names import MemoryName, common_prefix, is_ignored, memory_name
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, TensorMismatch

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Description:
    """A checkpoint as its headers tell it.

    family, config; prefix: what stands before every name in the file; places: for each parameter
    in memory its tensor on disk (without prefix) by expert, None for a whole tensor; own_head: an
    lm_head that is not the embedding; values: config.json as it is.
    """

    family: Family
    config: SwitchConfig
    prefix: str
    places: Mapping[str, dict[int | None, str]]
    own_head: bool
    has_decoder: bool
    values: Mapping[str, Any]


def describe(source: Source) -> Description:
    """Read config.json (or infer it from shapes) and place every tensor.

    Raises ConfigError naming the field, or TensorMismatch for a tensor that is not of the family.
    """
    path = source.directory / "config.json"
    prefix = common_prefix(source.tensors)
    own_file = path.is_file() and not (prefix and source.path.is_file())
    values: Mapping[str, Any] = read_json(path, most=_MAX_CONFIG_BYTES) if own_file else {}
    family = _named(path, family_of, values) if own_file else None
    _named(path, refuse_quantized, values)
    refuse_foreign_tensors(source.tensors, source.path)
    names = [n.removeprefix(prefix) for n in source.tensors if n.startswith(prefix)]
    for kind in ("Local", "TransientGlobal"):
        if any(f".{kind}SelfAttention." in name for name in names):
            raise long_t5_refusal(kind, source.path)
    places = _places(names, source)
    own_head = _has_own_head(source, prefix, places)
    weights = Weights(frozenset(names), own_head)
    if family is not None:
        config = _named(path, family.read, values, weights)
    else:
        family, config = inferred(source, prefix, weights)
    return Description(family, config, prefix, places, own_head, weights.has_decoder, values)


def inferred(source: Source, prefix: str, weights: Weights) -> tuple[Family, SwitchConfig]:
    """Family and config of dense weights that come without config.json, from their shapes.

    What shapes do not tell is T5's default: gated means gated-gelu, 128 the maximal distance.
    """
    shapes = {n: source.tensors[prefix + n].shape for n in weights.names}
    table_name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    query_name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    embedding = next(
        (shapes[n] for n in ("shared.weight", "encoder.embed_tokens.weight") if n in shapes), None
    )
    if embedding is None or table_name not in shapes or query_name not in shapes:
        hint = "Put the model's config.json beside the weights."
        raise ConfigError(
            "no config.json, and the tensors are not a dense T5's", path=source.path, hint=hint
        )
    if any(".mlp.experts." in name for name in shapes):
        hint = "Put the model's config.json beside the weights."
        raise ConfigError("sparse weights need their config.json", path=source.path, hint=hint)
    ff = "encoder.block.0.layer.1.DenseReluDense."
    gated = f"{ff}wi_0.weight" in shapes
    inner, heads = shapes[query_name][0], shapes[table_name][1]
    every = table_name.replace("block.0", "block.1") in shapes
    config = SwitchConfig(
        vocab_size=embedding[0],
        d_model=embedding[1],
        d_kv=inner // max(heads, 1),
        num_heads=heads,
        d_ff=shapes.get(f"{ff}wi_0.weight" if gated else f"{ff}wi.weight", (0,))[0],
        num_layers=_depth(weights.names, "encoder"),
        num_decoder_layers=_depth(weights.names, "decoder") or None,
        feed_forward_proj="gated-gelu" if gated else "relu",
        relative_attention_num_buckets=shapes[table_name][0],
        tie_word_embeddings=not weights.own_head,
        position_bias_every_layer=every,
        scale_decoder_outputs=not weights.own_head,
    )
    return (UMT5Family() if every else T5Family()), config


def _depth(names: frozenset[str], stack: str) -> int:
    start = f"{stack}.block."
    indices = {n.removeprefix(start).split(".")[0] for n in names if n.startswith(start)}
    return len(indices)


def _places(names: list[str], source: Source) -> dict[str, dict[int | None, str]]:
    places: dict[str, dict[int | None, str]] = {}
    for name in names:
        if is_ignored(name):
            continue
        place = _place(name, source)
        experts = places.setdefault(place.name, {})
        if place.expert in experts and place.name != "lm_head.weight":
            reason = f"{name!r} and {experts[place.expert]!r} are the same parameter"
            raise TensorMismatch(reason, path=source.path, key=name)
        experts[place.expert] = name
    alias = next((n for n in names if n.endswith("embed_tokens.weight")), None)
    if "shared.weight" not in places and alias:
        places["shared.weight"] = {None: alias}
    return places


def _place(name: str, source: Source) -> MemoryName:
    try:
        return memory_name(name)
    except TensorMismatch as error:
        raise TensorMismatch(
            error.message, path=source.path, key=error.key, hint=error.hint
        ) from None


def _has_own_head(source: Source, prefix: str, places: Mapping[str, dict[int | None, str]]) -> bool:
    """Whether there is a head whose bytes are not the embedding's."""
    head, shared = places.get("lm_head.weight"), places.get("shared.weight")
    if head is None or shared is None:
        return head is not None
    first, second = prefix + head[None], prefix + shared[None]
    a, b = source.info(first), source.info(second)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return True
    if a.path is not None and (a.path, a.offset) == (b.path, b.offset):
        return False
    # Different heads differ in the first chunk; equal ones are the rare old file with aliases.
    size = max(1, math.prod(a.shape))
    pairs = zip(source.chunks(first), source.chunks(second), strict=True)
    return size > 1 and any(x != y for x, y in pairs)


def _named(path: Path, read: Any, *arguments: Any) -> Any:
    """Call a reader of config.json; its errors name the file."""
    try:
        return read(*arguments)
    except ConfigError as error:
        if error.path is None:
            error.path = str(path)
            error.args = (str(error),)
        raise
