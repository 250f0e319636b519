"""Dense models into sparse ones, and back: on disk (streamed) and live. No torch on import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from moezoo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moezoo.adapters.upcycle.calibration import Calibration
    from moezoo.adapters.upcycle.convert import ConversionReport
    from moezoo.models import SwitchEncoderModel, SwitchForConditionalGeneration, SwitchModel

    M = TypeVar("M", SwitchForConditionalGeneration, SwitchModel, SwitchEncoderModel)


@overload
def upcycle(
    model_or_path: M,
    out: None = None,
    *,
    num_experts: int,
    layers: Any = ...,
    init: Any = ...,
    preserve: str = ...,
    router: Any = ...,
    router_init: Any = ...,
    capacity: Any = ...,
    seed: int = ...,
    dtype: str | None = ...,
    max_shard_size: int | str = ...,
    layout: str = ...,
    overwrite: bool = ...,
    allow_nonfinite: bool = ...,
    drop_heads: bool = ...,
    calibration: Calibration | None = ...,
) -> M: ...


@overload
def upcycle(
    model_or_path: nn.Module,
    out: None = None,
    *,
    num_experts: int,
    layers: Any = ...,
    init: Any = ...,
    preserve: str = ...,
    router: Any = ...,
    router_init: Any = ...,
    capacity: Any = ...,
    seed: int = ...,
    dtype: str | None = ...,
    max_shard_size: int | str = ...,
    layout: str = ...,
    overwrite: bool = ...,
    allow_nonfinite: bool = ...,
    drop_heads: bool = ...,
    calibration: Calibration | None = ...,
) -> Any: ...


@overload
def upcycle(
    model_or_path: str | Path,
    out: str | Path,
    *,
    num_experts: int,
    layers: Any = ...,
    init: Any = ...,
    preserve: str = ...,
    router: Any = ...,
    router_init: Any = ...,
    capacity: Any = ...,
    seed: int = ...,
    dtype: str | None = ...,
    max_shard_size: int | str = ...,
    layout: str = ...,
    overwrite: bool = ...,
    allow_nonfinite: bool = ...,
    drop_heads: bool = ...,
    calibration: Calibration | None = ...,
) -> ConversionReport: ...


def upcycle(
    model_or_path: nn.Module | str | Path,
    out: str | Path | None = None,
    *,
    num_experts: int,
    layers: Any = None,
    init: Any = "copy",
    preserve: str = "exact",
    router: Any = None,
    router_init: Any = None,
    capacity: Any = "dropless",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    layout: str = "auto",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    drop_heads: bool = False,
    calibration: Calibration | None = None,
) -> nn.Module | ConversionReport:
    """Turn a dense model into a sparse one that computes the same (Sparse Upcycling, 2212.05055):
    a T5 into a Switch model, on disk also a decoder into its sparse sibling (docs/stacks.md).

    Args:
        model_or_path: a live model (moezoo's or transformers'), or a checkpoint on disk.
        out: the directory to write, for a checkpoint; it is streamed, never held in memory.
        num_experts: experts per sparse layer; it and `layers`, `init`, `preserve`, `router`,
            `router_init`, `capacity`, `seed`, `dtype` and `max_shard_size` are the recipe; see
            `moezoo.adapters.upcycle.recipe.Recipe`.
        layout, overwrite, allow_nonfinite: of what is written; see `moezoo.save` and `moezoo.load`.
        drop_heads: leave out heads that moezoo's models do not have.
        calibration: sample ids for router initialisations that need them.

    Returns:
        A new live model for a live model, the report of the conversion for a path.

    Raises MoezooError naming what does not fit; the target is then what it was.
    """
    from moezoo.adapters.upcycle.recipe import Recipe

    recipe = Recipe(
        num_experts=num_experts,
        layers=layers,
        init=init,
        preserve=preserve,
        router=router,
        router_init=router_init,
        capacity=capacity,
        seed=seed,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    if isinstance(model_or_path, (str, Path)):
        from moezoo.adapters.upcycle.convert import convert

        if out is None:
            hint = "Pass out=..., or load the model first."
            raise ConfigError("a checkpoint on disk needs a target", field="out", hint=hint)
        return convert(
            model_or_path,
            out,
            recipe,
            layout=layout,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            drop_heads=drop_heads,
            calibration=calibration,
        )
    if out is not None:
        hint = "Save the result with moezoo.save."
        raise ConfigError("a live model is not written", field="out", hint=hint)
    from moezoo.adapters.upcycle.live import upcycle_model

    return upcycle_model(model_or_path, recipe, calibration=calibration, drop_heads=drop_heads)


@overload
def downcycle(model_or_path: M, out: None = None, *, overwrite: bool = ...) -> M: ...


@overload
def downcycle(model_or_path: nn.Module, out: None = None, *, overwrite: bool = ...) -> Any: ...


@overload
def downcycle(
    model_or_path: str | Path, out: None = None, *, overwrite: bool = ...
) -> dict[str, Tensor]: ...


@overload
def downcycle(model_or_path: str | Path, out: str | Path, *, overwrite: bool = ...) -> Path: ...


def downcycle(
    model_or_path: nn.Module | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> Any:
    """The inverse of `upcycle`; byte-identical tensors where it was exact.

    Args:
        model_or_path: a live model, whose dense twin is returned, or a checkpoint on disk.
        out: the directory to write, for a checkpoint; None returns its dense tensors by name.
        overwrite: replace what is at `out`.

    Raises TensorMismatch naming a layer whose experts differ.
    """
    if isinstance(model_or_path, (str, Path)):
        from moezoo.adapters.upcycle.downcycling import downcycle_checkpoint

        return downcycle_checkpoint(model_or_path, out, overwrite=overwrite)
    from moezoo.adapters.upcycle.live import downcycle_model

    return downcycle_model(model_or_path)
