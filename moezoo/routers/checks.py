"""Refusals that several routers share, each a ConfigError naming the option, and one thing that two
of them accept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from moezoo.errors import ConfigError


def check_one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of the allowed words."""
    if value not in allowed:
        wanted = " or ".join(repr(word) for word in allowed)
        raise ConfigError(f"unknown {name}", field=name, expected=wanted, found=repr(value))


def check_number(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None
) -> None:
    """Refuse a number that is not finite, or too small."""
    wanted = "finite" if above is None else f"> {above}"
    wanted = wanted if at_least is None else f">= {at_least}"
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    fine = plain and math.isfinite(value)
    fine = fine and (above is None or value > above) and (at_least is None or value >= at_least)
    if not fine:
        raise ConfigError(f"{name} is out of range", field=name, expected=wanted, found=repr(value))


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse a value that is no whole number in [low, high]."""
    plain = isinstance(value, int) and not isinstance(value, bool)
    if not plain or value < low or (high is not None and value > high):
        wanted = f"a whole number >= {low}" if high is None else f"a whole number, {low} to {high}"
        raise ConfigError(f"{name} is out of range", field=name, expected=wanted, found=repr(value))


def accept_scalar(router: nn.Module, name: str) -> None:
    """Let a router load its learned number `name` (1,) from a state of before, where it was ().

    It has a dimension because a tensor without one cannot be divided among ranks (FSDP2).
    """
    router.register_load_state_dict_pre_hook(partial(_widen, name))  # type: ignore[no-untyped-call]


def _widen(name: str, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    found = state.get(prefix + name)
    if found is not None and found.dim() == 0:
        state[prefix + name] = found.view(1)
