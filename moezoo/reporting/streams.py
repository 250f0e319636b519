"""The texts that layers read: an encoder's and a decoder's tokens are two, of a language model
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moezoo.errors import ConfigError
from moezoo.records import Routing
from moezoo.reporting.observation import Observation, real_tokens
from moezoo.reporting.packing import packed
from moezoo.reporting.pieces import readable


@dataclass
class Stream:
    """Real tokens in order, and the layers that read them.

    Fields: name; ids (T,) int64, or None where nobody knows them; lengths, of the sequences;
    num_tokens; layers, their names.
    """

    name: str
    ids: Tensor | None
    lengths: list[int]
    num_tokens: int
    layers: list[str] = field(default_factory=list)

    def document(
        self, shown: int, listed: Tensor, piece: Callable[[int], str]
    ) -> tuple[dict[str, Any], Tensor]:
        """The stream's part of a report, and its vocabulary (V,) of ids in rising order.

        Args:
            shown: tokens of the excerpt. listed: ids that are named beside those of the excerpt.
        """
        sequences, left = [], shown
        for length in self.lengths:
            sequences.append(min(length, left))
            left -= sequences[-1]
        about: dict[str, Any] = {
            "name": self.name,
            "tokens": self.num_tokens,
            "shown": shown,
            "sequences": [length for length in sequences if length],
        }
        if self.ids is None:
            return about, torch.empty(0, dtype=torch.int64, device="cpu")
        vocabulary = torch.unique(torch.cat([self.ids[:shown], listed]))
        all_ids, all_counts = torch.unique(self.ids, return_counts=True)
        about["pieces"] = [readable(piece(number)) for number in vocabulary.tolist()]
        about["counts"] = packed(all_counts[torch.searchsorted(all_ids, vocabulary)])
        about["piece"] = packed(torch.searchsorted(vocabulary, self.ids[:shown].contiguous()))
        return about, vocabulary


def streams_of(seen: Observation) -> list[Stream]:
    """The streams of an observation: layers that read the same tokens share one.

    Raises ConfigError naming a layer whose ids are not as many as its tokens.
    """
    found: list[Stream] = []
    for layer, calls in seen.trace.by_layer.items():
        made = _stream(layer, calls, seen.ids)
        for other in found:
            if _same(other, made):
                other.layers.append(layer)
                break
        else:
            found.append(made)
    twice = Counter(stream.name for stream in found)
    for number, stream in enumerate(found, 1):
        if twice[stream.name] > 1:
            stream.name = f"{stream.name} {number}"
    return found


def labels_of(layers: Sequence[str]) -> list[str]:
    """Short names of layers: "encoder 3" for encoder.blocks.3.mlp; the whole names where two would
    be equal.
    """
    short = []
    for name in layers:
        parts = name.split(".")
        number = next((part for part in parts if part.isdigit()), None)
        side = parts[0] if parts[0] in ("encoder", "decoder") else "layer"
        short.append(name or "layer" if number is None else f"{side} {number}")
    return short if len(set(short)) == len(short) else [name or "layer" for name in layers]


def _stream(
    layer: str, calls: Sequence[Routing], ids: Mapping[str, Sequence[Tensor | None]]
) -> Stream:
    given = ids.get(layer, (None,) * len(calls))
    if len(given) != len(calls):
        reason = f"layer {layer!r} has ids of another number of calls"
        raise ConfigError(reason, field="ids", expected=len(calls), found=len(given))
    kept: list[Tensor] = []
    lengths: list[int] = []
    for call, found in zip(calls, given, strict=True):
        real_T = real_tokens(call)
        if found is not None and found.numel() != len(real_T):
            reason = f"layer {layer!r} has ids of another number of tokens"
            raise ConfigError(reason, field="ids", expected=len(real_T), found=found.numel())
        lengths += _lengths(real_T, call.sequence_length)
        if found is not None:
            kept.append(found.reshape(-1).cpu().long()[real_T])
    known = torch.cat(kept) if len(kept) == len(calls) else None
    side = layer.partition(".")[0]
    name = side if side in ("encoder", "decoder") else "text"
    return Stream(name, known, lengths, sum(lengths), [layer])


def _lengths(real_T: Tensor, length: int) -> list[int]:
    """Real tokens of every sequence; the last one may be followed by padding of its group."""
    if not length:
        return [int(real_T.sum())]
    filled = torch.cat([real_T, real_T.new_zeros(-len(real_T) % length)])
    return [count for count in filled.view(-1, length).sum(1).tolist() if count]


def _same(one: Stream, other: Stream) -> bool:
    if one.name != other.name or one.lengths != other.lengths:
        return False
    if one.ids is None or other.ids is None:
        return one.ids is other.ids
    return torch.equal(one.ids, other.ids)
