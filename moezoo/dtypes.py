"""Dtypes as people write them: a torch.dtype, or a word such as "bfloat16". No torch on import."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moezoo.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

FLOATING = ("float32", "bfloat16", "float16", "float64")
_SHORT = {
    "fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16",
    "half": "float16", "fp64": "float64", "double": "float64",
}  # fmt: skip


def dtype_word(value: torch.dtype | str, known: tuple[str, ...] = FLOATING) -> str:
    """The word of a floating dtype: "bfloat16" of torch.bfloat16, "torch.bfloat16" and "bf16".

    Raises ConfigError naming the nearest for what is not in `known`.
    """
    text = str(value).removeprefix("torch.")
    word = _SHORT.get(text, text)
    if word not in known:
        hint = did_you_mean(word, known)
        raise ConfigError(f"unknown dtype {text[:80]!r}", field="dtype", hint=hint)
    return word


def as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """The floating torch.dtype of that name, or what it is already; None stays None.

    Raises ConfigError for any other.
    """
    import torch

    if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    if isinstance(value, str):
        found: torch.dtype = getattr(torch, dtype_word(value))
        return found
    wanted = "a floating torch.dtype, or its name"
    raise ConfigError("bad dtype", field="dtype", expected=wanted, found=repr(value))
