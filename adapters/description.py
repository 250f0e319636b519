"""What a checkpoint on disk is: its family, config and where each tensor goes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from moezoo.adapters.formats.files import quoted, read_json
from moezoo.adapters.names import (
    HEAD,
    MAY_REPEAT,
    SHARED,
    TABLES,
    MemoryName,
    common_prefix,
    is_head,
    is_stray,
    memory_name,
)
from moezoo.config import SwitchConfig
from moezoo.errors import ConfigError, TensorMismatch

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Description:
    """A checkpoint as its headers tell it.

    family, config; prefix: what stands before every name in the file; places: for each parameter
    in memory its tensor on disk (without prefix) by expert, None for a whole tensor; aliases:
    tensors on disk (without prefix) that repeat another, by its name there; dropped: tensors of a
    head that was left out; outside: those of a larger model around this one; values: config.json
    as it is.
    """

    family: Family
    config: Any  # a SwitchConfig, or a decoder's
    prefix: str
    places: Mapping[str, dict[int | None, str]]
    aliases: Mapping[str, str]
    dropped: tuple[str, ...]
    outside: tuple[str, ...]
    has_decoder: bool
    values: Mapping[str, Any]

    @property
    def own_head(self) -> bool:
        """Whether there is an lm_head that is not the embedding."""
        return HEAD in self.places


def describe(source: Source, *, drop_heads: bool = False) -> Description:
    """Read config.json (or infer it from shapes) and place every tensor.

    Args:
        drop_heads: leave out heads that moezoo's models do not have, such as a classifier's.

    Raises ConfigError naming the field, or TensorMismatch for a tensor that is not of the family.
    """
    path = source.directory / "config.json"
    prefix = common_prefix(source.tensors)
    inside_another = bool(prefix) and source.path.is_file()
    configured = path.is_file() and not inside_another
    values: Mapping[str, Any] = read_json(path, most=_MAX_CONFIG_BYTES) if configured else {}
    family = named_file(path, family_of, values) if configured else None
    named_file(path, refuse_quantized, values)
    refuse_foreign_tensors(source.tensors, source.path)
    dropped = _heads(source, prefix, drop=drop_heads)
    heads = set(dropped)
    outside = tuple(n for n in source.tensors if not n.startswith(prefix) and n not in heads)
    if outside and configured:
        raise _unexpected(source, outside[0])
    ours = (n for n in source.tensors if n.startswith(prefix) and n not in heads)
    names = [name.removeprefix(prefix) for name in ours]
    for kind in ("Local", "TransientGlobal"):
        if any(f".{kind}SelfAttention." in name for name in names):
            raise long_t5_refusal(kind, source.path)
    places, aliases = _places(names, source, prefix)
    own = [n for n in MAY_REPEAT if n in places and not _repeats(source, prefix, places, n)]
    weights = Weights(
        frozenset(names),
        own_head=HEAD in own,
        own_embeddings=tuple(stack for stack, table in TABLES.items() if table in own),
    )
    if family is not None:
        config = named_file(path, family.read, values, weights)
    else:
        family, config = inferred(source, prefix, weights)
    for name in _wanted_by_none(config, own):
        if name in places:
            aliases[places.pop(name)[None]] = SHARED
    return Description(
        family, config, prefix, places, aliases, dropped, outside, weights.has_decoder, values
    )


def inferred(source: Source, prefix: str, weights: Weights) -> tuple[Family, SwitchConfig]:
    """Family and config of dense weights that come without config.json, from their shapes.

    What shapes do not tell is T5's default: gated means gated-gelu, 128 the maximal distance.
    """
    shapes = {n: source.tensors[prefix + n].shape for n in weights.names}
    table_name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    query_name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    embedding = next((shapes[n] for n in (SHARED, *TABLES.values()) if n in shapes), None)
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
        own_embeddings=weights.own_embeddings,
        position_bias_every_layer=every,
        scale_decoder_outputs=not weights.own_head,
    )
    return (UMT5Family() if every else T5Family()), config


def _depth(names: frozenset[str], stack: str) -> int:
    start = f"{stack}.block."
    indices = {n.removeprefix(start).split(".")[0] for n in names if n.startswith(start)}
    return len(indices)


def _heads(source: Source, prefix: str, *, drop: bool) -> tuple[str, ...]:
    """The tensors of heads that stand beside the model. Raises TensorMismatch unless they may be
    dropped.
    """
    beside = prefix.rstrip(".").rpartition(".")[0]
    beside += "." if beside else ""
    starts = {beside, prefix}
    heads = tuple(
        name
        for name in source.tensors
        if any(name.startswith(s) and is_head(name.removeprefix(s)) for s in starts)
    )
    if heads and not drop:
        raise TensorMismatch(
            f"moezoo's models have no head such as {quoted(heads[0])} ({len(heads)} tensors)",
            path=source.path,
            key=heads[0],
            hint="`moezoo upcycle` and `export` leave it out with --drop-heads, Python with "
            "drop_heads=True.",
        )
    return heads


def _unexpected(source: Source, name: str) -> TensorMismatch:
    reason = f"unexpected tensor {quoted(name)} beside the model"
    return TensorMismatch(reason, path=source.path, key=name[:120])


def _places(
    names: list[str], source: Source, prefix: str
) -> tuple[dict[str, dict[int | None, str]], dict[str, str]]:
    """Where each tensor goes, and those that repeat another by their names."""
    places: dict[str, dict[int | None, str]] = {}
    aliases: dict[str, str] = {}
    for name in names:
        if is_stray(name):
            continue
        place = _place(name, source)
        experts = places.setdefault(place.name, {})
        first = experts.setdefault(place.expert, name)
        if first == name:
            continue
        if place.name != HEAD or not same_bytes(source, prefix + first, prefix + name):
            reason = f"{name!r} and {first!r} are the same parameter"
            raise TensorMismatch(reason, path=source.path, key=name)
        aliases[name] = first
    tables = [table for table in TABLES.values() if table in places]
    if SHARED not in places and tables:
        places[SHARED] = places.pop(tables[0])
        if len(tables) > 1 and HEAD not in places:
            _refuse_two_tables(source, prefix, tables)
    return places, aliases


def _refuse_two_tables(source: Source, prefix: str, tables: list[str]) -> None:
    """Raise TensorMismatch where nothing says which of two tables a tied head is tied to."""
    if not same_bytes(source, *(prefix + table for table in tables)):
        raise TensorMismatch(
            f"{tables[0]} and {tables[1]} differ, and there is neither shared.weight nor a head",
            path=source.path,
            key=prefix + SHARED,
        )


def _wanted_by_none(config: SwitchConfig, own: Sequence[str]) -> list[str]:
    """Tables that only repeat the shared one, and that the model has no parameter for."""
    has = {table for stack, table in TABLES.items() if stack in config.own_embeddings}
    has |= set() if config.tie_word_embeddings else {HEAD}
    return [name for name in MAY_REPEAT if name not in own and name not in has]


def _place(name: str, source: Source) -> MemoryName:
    try:
        return memory_name(name)
    except TensorMismatch as error:
        raise TensorMismatch(
            error.message, path=source.path, key=error.key, hint=error.hint
        ) from None


def _repeats(
    source: Source, prefix: str, places: Mapping[str, dict[int | None, str]], name: str
) -> bool:
    """Whether a table's bytes are those of the shared embeddings."""
    if SHARED not in places:
        return False
    return same_bytes(source, prefix + places[name][None], prefix + places[SHARED][None])


def same_bytes(source: Source, first: str, second: str) -> bool:
    """Whether two tensors are the same bytes."""
    a, b = source.info(first), source.info(second)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.path is not None and (a.path, a.offset) == (b.path, b.offset):
        return True
    # Tables that differ do so in the first chunk; equal ones are read whole.
    pairs = zip(source.chunks(first), source.chunks(second), strict=True)
    return all(x == y for x, y in pairs)


def named_file(path: Path, read: Any, *arguments: Any) -> Any:
    """Call a reader of config.json; its errors name the file."""
    try:
        return read(*arguments)
    except ConfigError as error:
        if error.path is None:
            error.path = str(path)
            error.args = (str(error),)
        raise
