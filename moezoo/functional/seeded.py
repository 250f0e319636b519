"""Random numbers from a seed of one's own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def keyed_seed(seed: int, *keys: object) -> int:
    """A seed of its own for each sequence of keys, such as a tensor's name and an expert: whoever
    draws it, and in whatever order, draws the same.
    """
    text = "\0".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Seeded(TorchFunctionMode):
    """Random numbers from a seed instead of torch's global generators, which other threads use;
    they are the same as after `torch.manual_seed`.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.sources: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _draws(func) and kwargs.get("generator") is None:
            given = args[0] if args and isinstance(args[0], torch.Tensor) else None
            device = kwargs.get("device") if given is None else given.device
            kwargs["generator"] = self._source(device)
        return func(*args, **kwargs)

    def _source(self, device: torch.device | str | None) -> torch.Generator:
        place = torch.get_default_device() if device is None else torch.device(device)
        if place not in self.sources:
            self.sources[place] = torch.Generator(place).manual_seed(self.seed)
        return self.sources[place]


_DRAWING = frozenset(
    (
        "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "log_normal_",
        "geometric_", "normal", "bernoulli", "multinomial", "rand", "randn", "randint", "randperm",
    )
)  # fmt: skip


def _draws(func: Callable[..., Any]) -> bool:
    """Whether a function takes a generator: of `torch.nn.init` too, whose inner calls are not
    seen.
    """
    if getattr(func, "__module__", "") == "torch.nn.init":
        return "generator" in inspect.signature(func).parameters
    return getattr(func, "__name__", "") in _DRAWING
