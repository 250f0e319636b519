"""From a name or a config to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moezoo.config import SwitchConfig
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
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model with random weights, in evaluation mode as `load` gives it.

    Args:
        name_or_config: a preset (`moezoo.list_models()`) or a SwitchConfig.
        task: "conditional_generation", "model" (no head) or "encoder".
        device: "meta" builds without memory.
        dtype: of the parameters, float32 by default.
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
    if seed is None:
        return _construct(TASKS[task], config, device, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _construct(TASKS[task], config, device, dtype)


def _construct(
    model: type[nn.Module],
    config: SwitchConfig,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError("dtype must be a floating torch.dtype", field="dtype", found=repr(dtype))
    place = torch.get_default_device() if device is None else usable_device(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with place, _Unfilled() if place.type == "meta" else nullcontext():
            return model(config).eval()
    finally:
        torch.set_default_dtype(before)


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
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ConfigError(f"no such device: {reason}", field="device", found=repr(name)) from None
    return device
