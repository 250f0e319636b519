"""The part of a divided tensor (a DTensor) that this rank holds, and its place in the whole."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moezoo.errors import ConfigError
from moezoo.functional.collective import rank_of_all


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor: where it begins and how long it is, by dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def runs(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """The row-major elements of the whole that it holds, as few contiguous runs as there are:
        the first element in the whole, in the part, and how many.
        """
        if not math.prod(self.sizes):
            return
        whole = len(shape)  # the dimensions from here on are held entirely
        while whole and self.sizes[whole - 1] == shape[whole - 1]:
            whole -= 1
        split = max(whole - 1, 0)
        length = math.prod(self.sizes[split:])
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        inner = sum(o * s for o, s in zip(self.offsets[split:], strides[split:], strict=True))
        for number in range(math.prod(self.sizes[:split])):
            start, rest = inner, number
            for d in reversed(range(split)):
                rest, place = divmod(rest, self.sizes[d])
                start += (self.offsets[d] + place) * strides[d]
            yield start, number * length, length

    def taken(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor, a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole

    @property
    def inner(self) -> Part:
        """The part of each slice of the first dimension that it holds any of."""
        return Part(self.offsets[1:], self.sizes[1:])


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank may hold a part."""
    loaded: Any = sys.modules.get("torch.distributed.tensor")  # nobody has one before
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of a model is divided among ranks."""
    return any(map(is_divided, model.parameters()))


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without DDP around it."""
    loaded: Any = sys.modules.get("torch.nn.parallel.distributed")
    wrapper = getattr(loaded, "DistributedDataParallel", ())
    inner: nn.Module = model.module if isinstance(model, wrapper) else model
    return inner


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a model before FSDP2 put one of its own in its place."""
    loaded: Any = sys.modules.get("torch.distributed.fsdp")
    marker = getattr(loaded, "FSDPModule", None)
    kind = type(model)
    others = [base for base in kind.__bases__ if base is not marker]
    return others[0] if marker in kind.__bases__ else kind


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuse to do to a sharded model what needs all of its weights. Raises ConfigError."""
    if isinstance(model, nn.Module) and is_sharded(model):
        hint = "Save it with moezoo.save, and use what moezoo.load reads on one rank."
        raise ConfigError(
            f"{what} needs a model that is not sharded over ranks", field="model", hint=hint
        )


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; the gradient of a part is a part."""
    divided: Any = tensor
    own: Tensor = divided.to_local() if is_divided(tensor) else tensor
    return own


def divided_like(tensor: Tensor, part: Tensor) -> Tensor:
    """A part as the whole that it is of, divided as `tensor` is; itself where that is whole."""
    if not is_divided(tensor):
        return part
    divided: Any = tensor
    made: Tensor = type(divided).from_local(
        part.contiguous(),
        divided.device_mesh,
        divided.placements,
        run_check=False,
        shape=divided.shape,
        stride=divided.stride(),
    )
    return made


def part_of(tensor: Tensor) -> Part:
    """The place of what this rank holds. Raises ConfigError for a tensor that is divided otherwise
    than by slices of a dimension, or twice along one.
    """
    sizes, offsets = list(tensor.shape), [0] * tensor.dim()
    if not is_divided(tensor):
        return Part(tuple(offsets), tuple(sizes))
    divided: Any = tensor
    divided_dims: set[int] = set()
    for number, placement in enumerate(divided.placements):
        if placement.is_replicate():
            continue
        dim: int = getattr(placement, "dim", -1)
        if not placement.is_shard() or dim in divided_dims:
            hint = "Shard it by moezoo.parallel.shard."
            found = str(divided.placements)
            raise ConfigError("a tensor is divided in a way not known", found=found, hint=hint)
        divided_dims.add(dim)
        ranks, place = (
            divided.device_mesh.size(number),
            divided.device_mesh.get_coordinate()[number],
        )
        each = -(-sizes[dim] // ranks)  # as torch.chunk does
        offsets[dim] = min(place * each, sizes[dim])
        sizes[dim] = min(each, sizes[dim] - offsets[dim])
    local = tuple(divided.to_local().shape)
    assert local == tuple(sizes), f"{local} held, {sizes} expected"
    return Part(tuple(offsets), tuple(sizes))


def is_first_holder(tensor: Tensor) -> bool:
    """Whether this rank is the one of all that hold the same part who speaks for it: rank 0 for
    what all hold.
    """
    if not is_divided(tensor):
        return rank_of_all() == 0
    divided: Any = tensor
    place = divided.device_mesh.get_coordinate()
    repeated = any(p.is_replicate() and at for p, at in zip(divided.placements, place, strict=True))
    # Of the meshes of experts alone, one per replica, the first one holds rank 0.
    return not repeated and bool((divided.device_mesh.mesh == 0).any())


def summed_over_shards(value: Tensor, of: Tensor, dims: Sequence[int]) -> Tensor:
    """What every rank summed up over dimensions of its part, summed over the parts: over every
    dimension of the mesh that divides one of these. In place; without gradient.
    """
    for mesh_dim, placement in enumerate(getattr(of, "placements", ())):
        if any(placement.is_shard(dim % of.dim()) for dim in dims):
            mesh: Any = of.device_mesh  # type: ignore[attr-defined]
            dist.all_reduce(value, group=mesh.get_group(mesh_dim))
    return value


def placed_like(of: Tensor, own: Tensor, *, reduced: int | None = None) -> Tensor:
    """A rank's part of a tensor that is sharded as `of`, as a sharded tensor; a plain tensor where
    `of` is one.

    Args:
        reduced: a dimension over which `of` was reduced to size 1, which every rank holds.
    """
    if not is_divided(of):
        return own
    from torch.distributed.tensor import DTensor

    shape, placements = reduced_layout(of, reduced)
    return DTensor.from_local(
        own,
        of.device_mesh,  # type: ignore[attr-defined]
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def reduced_layout(of: Tensor, reduced: int | None) -> tuple[list[int], list[Any]]:
    """Shape and placements of a sharded tensor that is reduced over a dimension, if over one."""
    from torch.distributed.tensor import Replicate

    shape, placements = list(of.shape), list(of.placements)  # type: ignore[attr-defined]
    if reduced is None:
        return shape, placements
    reduced %= of.dim()
    shape[reduced] = 1
    return shape, [Replicate() if place.is_shard(reduced) else place for place in placements]
