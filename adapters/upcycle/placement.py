"""Which layers become sparse, from a word or a few: `odd`, `last:6`, `enc=1,3;dec=all`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moezoo.config import LAYOUTS, sparse_layers
from moezoo.errors import ConfigError, did_you_mean

Layers = str | Sequence[int] | Mapping[str, str | Sequence[int]]
_STACKS = {"enc": "encoder", "dec": "decoder", "encoder": "encoder", "decoder": "decoder"}
_COUNTED = ("first", "last", "every")


def placed(
    layers: Layers, *, encoder_layers: int, decoder_layers: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sparse layers of the encoder and of the decoder.

    Args:
        layers: a layout (odd, mixed, bottom, middle, top, all, none), `first:N`, `last:N`,
            `every:N`, indices `1,3` or [1, 3]; for each stack apart as `enc=...;dec=...` (a stack
            left out stays dense) or as a mapping.

    Raises ConfigError for unknown words, layers that do not exist, and when no layer is left.
    """
    parts = _by_stack(layers)
    encoder = _one("encoder", parts.get("encoder", "none"), encoder_layers)
    decoder = _one("decoder", parts.get("decoder", "none"), decoder_layers)
    if not encoder and not decoder:
        raise ConfigError(
            "no layer would become sparse",
            field="layers",
            found=str(layers),
            hint="Use layers='all', or 'odd' for models of two layers and more.",
        )
    return encoder, decoder


def _by_stack(layers: Layers) -> dict[str, str | Sequence[int]]:
    if isinstance(layers, Mapping):
        items: list[tuple[str, str | Sequence[int]]] = list(layers.items())
    elif isinstance(layers, (list, tuple)):
        return {"encoder": layers, "decoder": layers}
    elif not isinstance(layers, str):
        wanted, found = "a word, a list of indices or a mapping", type(layers).__name__
        raise ConfigError("layers of another kind", field="layers", expected=wanted, found=found)
    elif "=" not in layers:
        return {"encoder": layers, "decoder": layers}
    else:
        items = [_split(part) for part in layers.split(";") if part.strip()]
    named: dict[str, str | Sequence[int]] = {}
    for stack, value in items:
        if stack not in _STACKS or _STACKS[stack] in named:
            raise ConfigError(
                f"unknown or repeated stack {str(stack)[:40]!r} in layers",
                field="layers",
                expected="enc=... and dec=...",
            )
        named[_STACKS[stack]] = value
    return named


def _split(part: str) -> tuple[str, str]:
    stack, _, value = part.partition("=")
    return stack.strip(), value.strip()


def _one(stack: str, value: str | Sequence[int], count: int) -> tuple[int, ...]:
    if not isinstance(value, str):
        return sparse_layers(tuple(value), count, f"{stack} layers")
    word, _, number = value.strip().partition(":")
    if number or word in _COUNTED:
        return _counted(stack, word, number, count)
    if re.fullmatch(r"\d{1,5}(\s*,\s*\d{1,5})*", value.strip()):
        indices = tuple(int(index) for index in value.split(","))
        return sparse_layers(indices, count, f"{stack} layers")
    if word not in LAYOUTS:
        hint = did_you_mean(word, [*LAYOUTS, *(f"{name}:N" for name in _COUNTED)])
        raise ConfigError(f"unknown layers {value[:80]!r}", field="layers", hint=hint)
    return sparse_layers(word, count, f"{stack} layers")


def _counted(stack: str, word: str, number: str, count: int) -> tuple[int, ...]:
    if word not in _COUNTED or not re.fullmatch(r"\d{1,5}", number) or int(number) < 1:
        raise ConfigError(
            f"unknown layers {f'{word}:{number}'[:80]!r}",
            field="layers",
            expected="first:N, last:N or every:N with N >= 1",
        )
    step = int(number)
    if word != "every" and step > count:
        raise ConfigError(
            f"the {stack} has no {step} layers", field="layers", expected=f"<= {count}", found=step
        )
    every = range(count)
    chosen = {
        "first": every[:step],
        "last": every[count - step :],
        "every": every[step - 1 :: step],
    }
    return tuple(chosen[word])
