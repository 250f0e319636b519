"""From a name or a config to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moezoo.config import SwitchConfig
from moezoo.dtypes import as_dtype
from moezoo.errors import ConfigError, did_you_mean
from moezoo.models import SwitchEncoderModel, SwitchForConditionalGeneration, SwitchModel
from moezoo.presets import preset

TASKS: dict[str, type[nn.Module]] = {
    "conditional_generation": SwitchForConditionalGeneration,
    "model": SwitchModel,
    "encoder": SwitchEncoderModel,
}


def build(
    name_or_config: str | SwitchConfig,
    /,
    *,
    task: str = "conditional_generation",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model with random weights, in evaluation mode as `load` gives it.

    Args:
        name_or_config: a preset (`moezoo.list_models()`) or a SwitchConfig.
        task: "conditional_generation", "model" (no head) or "encoder".
        device: "meta" builds without memory.
        dtype: of the parameters, or its name ("bfloat16"); float32 by default.
        seed: of the weights; the global generator is left as it was.
        overrides: any field of SwitchConfig, such as `num_experts=16` or `router="top_k"`.

    Raises RegistryError for an unknown name, ConfigError for a bad task, field or combination.
    """
    config = preset(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if not isinstance(config, SwitchConfig):
        found = type(config).__name__
        raise ConfigError("build takes a preset's name or a SwitchConfig", found=found)
    if not isinstance(task, str) or task not in TASKS:
        raise ConfigError(f"unknown task {task!r}", field="task", hint=did_you_mean(task, TASKS))
    config = config.replace(**overrides)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError("seed must be a whole number", field="seed", found=repr(seed))
    return _construct(TASKS[task], config, device, as_dtype(dtype), seed)


def _construct(
    model: type[nn.Module],
    config: SwitchConfig,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    seed: int | None,
) -> nn.Module:
    """The model, first without memory, then in its dtype on its device, then drawn.

    Nothing global is touched, so threads may build at once: torch's modes are a thread's own.
    """
    place = torch.get_default_device() if device is None else usable_device(device)
    with torch.device("meta"), _Unfilled():
        made: Any = model(config)
    made.to(dtype or torch.get_default_dtype())
    if place.type != "meta":
        made.to_empty(device=place)
        with place, nullcontext() if seed is None else _Seeded(seed):
            made.reset_parameters()
    built: nn.Module = made.eval()
    return built


class _Seeded(TorchFunctionMode):
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


class _Unfilled(TorchFunctionMode):
    """Leaves out calls that only fill a tensor: "meta" has no content, and for some of them torch
    would import its compiler, which takes a second.
    """

    _FILLING = frozenset(
        ("normal_", "uniform_", "constant_", "zero_", "fill_", "erfinv_", "mul_", "clamp_", "copy_")
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._FILLING:
            filled = args[0] if args else kwargs["tensor"]  # as torch.nn.init calls itself
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


def usable_device(name: torch.device | str) -> torch.device:
    """The device of that name. Raises ConfigError for one that torch cannot use here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # A build of torch without a device says so by an AssertionError for CUDA.
    except (AssertionError, RuntimeError, TypeError) as error:
        said = str(error).partition("\n")[0].partition(". ")[0]
        reason = "torch knows none of that name" if said.startswith("Expected one of") else said
        here = [str(kind) for kind in (torch.accelerator.current_accelerator(), "cpu") if kind]
        hint = f"There is {' and '.join(here)} here; a GPU of NVIDIA or AMD is called cuda."
        raise ConfigError(f"no device {name!r}: {reason}", field="device", hint=hint) from None
    return device
