"""From a name or a config to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moezoo.config import SwitchConfig
from moezoo.dtypes import as_dtype
from moezoo.errors import ConfigError, did_you_mean
from moezoo.functional.collective import gathered_texts
from moezoo.functional.seeded import Seeded
from moezoo.models import SwitchEncoderModel, SwitchForConditionalGeneration, SwitchModel
from moezoo.models.initialize import initialize_parts
from moezoo.presets import preset

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TASKS: dict[str, type[nn.Module]] = {
    "conditional_generation": SwitchForConditionalGeneration,
    "model": SwitchModel,
    "encoder": SwitchEncoderModel,
}


@overload
def build(
    name_or_config: str | SwitchConfig,
    /,
    *,
    task: Literal["conditional_generation"] = ...,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    seed: int | None = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> SwitchForConditionalGeneration: ...


@overload
def build(
    name_or_config: str | SwitchConfig,
    /,
    *,
    task: Literal["model"],
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    seed: int | None = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> SwitchModel: ...


@overload
def build(
    name_or_config: str | SwitchConfig,
    /,
    *,
    task: Literal["encoder"],
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    seed: int | None = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> SwitchEncoderModel: ...


@overload
def build(
    name_or_config: str | SwitchConfig,
    /,
    *,
    task: str,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | str | None = ...,
    seed: int | None = ...,
    mesh: DeviceMesh | None = ...,
    precision: torch.dtype | str | None = ...,
    hybrid: bool = ...,
    **overrides: Any,
) -> nn.Module: ...


def build(
    name_or_config: str | SwitchConfig,
    /,
    *,
    task: str = "conditional_generation",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    mesh: DeviceMesh | None = None,
    precision: torch.dtype | str | None = None,
    hybrid: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Build a model with random weights, in evaluation mode as `load` gives it.

    Args:
        name_or_config: a preset (`moezoo.list_models()`) or a SwitchConfig.
        task: "conditional_generation", "model" (no head) or "encoder".
        device: "meta" builds without memory.
        dtype: of the parameters, or its name ("bfloat16"); float32 by default.
        seed: of the weights; the global generator is left as it was.
        mesh: of `moezoo.parallel.mesh`: the model as `moezoo.parallel.shard` makes it, of which a
            rank draws its own experts alone. With a seed its weights are the same over any ranks,
            and others than without a mesh. Every rank must call it.
        precision, hybrid: with a mesh, what products compute in, and whether dense weights are
            divided within a node alone; see `moezoo.parallel.shard`.
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
    kind = as_dtype(dtype)
    if mesh is not None:
        from moezoo.parallel import shard  # which brings torch's compiler

        divided = shard(_empty(TASKS[task], config, kind), mesh, precision=precision, hybrid=hybrid)
        place = usable_device(mesh.device_type if device is None else device)
        return _drawn_parts(divided, config, place, seed)
    if hybrid:
        raise ConfigError("hybrid needs a mesh", field="hybrid", hint="Pass mesh=...")
    if precision is not None:
        hint = "Pass dtype=..., or use torch.autocast."
        raise ConfigError("a precision needs a mesh", field="precision", hint=hint)
    return _construct(TASKS[task], config, device, kind, seed)


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
    made = _empty(model, config, dtype)
    if place.type != "meta":
        made.to_empty(device=place)
        with place, nullcontext() if seed is None else Seeded(seed):
            made.reset_parameters()
    built: nn.Module = made.eval()
    return built


def _drawn_parts(
    made: nn.Module, config: SwitchConfig, place: torch.device, seed: int | None
) -> nn.Module:
    """The same over ranks, of a model that was divided while it had no memory, so that no rank ever
    holds the whole.
    """
    if place.type != "meta":
        made.to_empty(device=place)
        drawn = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        with place:
            initialize_parts(made, config, seed=int(gathered_texts(str(drawn))[0]))
    return made.eval()


def _empty(model: type[nn.Module], config: SwitchConfig, dtype: torch.dtype | None) -> Any:
    """The model on "meta"."""
    with torch.device("meta"), _Unfilled():
        made = model(config)
    return made.to(dtype or torch.get_default_dtype())


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
