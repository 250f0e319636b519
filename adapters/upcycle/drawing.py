"""What a plan needs beyond bytes: router rows, dtype conversion, expert arithmetic."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moezoo.adapters.formats import Source
from moezoo.adapters.formats.base import tensor_bytes, torch_dtype
from moezoo.adapters.formats.files import quoted
from moezoo.adapters.plan import Move, Plan
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.errors import NonFiniteWeights

if TYPE_CHECKING:
    from torch import Tensor

    from moezoo.adapters.upcycle.calibration import LayerSample


def router_bytes(plan: Plan, layer: str, target: TensorPlan, sample: LayerSample | None) -> bytes:
    """The router (E, D) of a layer, in the target's dtype. Needs torch only for sample text."""
    experts, width = target.shape
    rows = plan.router_init.rows(
        experts,
        width,
        key=layer,
        seed=plan.recipe.seed,
        inputs=None if sample is None else sample.inputs,
        experts=None if sample is None else sample.experts,
    )
    chosen = plan.init.router_rows(experts)
    if chosen != list(range(experts)):
        rows = array("f", (v for row in chosen for v in rows[row * width : (row + 1) * width]))
    return _packed(rows, target.dtype)


def converted(source: Source, move: Move, scale: float = 1.0) -> memoryview:
    """A tensor, scaled, in another dtype. Raises NonFiniteWeights where a weight leaves its
    range.
    """
    tensor = source.tensor(move.source.name)
    scaled = tensor if scale == 1.0 else tensor * scale
    return tensor_bytes(cast(scaled, move.targets[0].dtype, move.source.name))


def expert_tensors(
    plan: Plan, layer: str, sources: Sequence[Source]
) -> Iterator[tuple[str, memoryview]]:
    """Every expert matrix of a layer with its name on disk; one expert in memory at a time."""
    moves = [move for move in plan.moves if move.layer == layer]
    names = {move.matrix or "": move for move in moves}
    dense = [
        {matrix: source.tensor(move.source.name) for matrix, move in names.items()}
        for source in sources
    ]
    for index in range(plan.recipe.num_experts):
        made = plan.init.expert(
            dense, index, plan.recipe.num_experts, key=layer, seed=plan.recipe.seed
        )
        for matrix, move in names.items():
            scaled = made[matrix] if move.scale == 1.0 else made[matrix] * move.scale
            tensor = cast(scaled, move.targets[index].dtype, move.source.name)
            yield move.targets[index].name, tensor_bytes(tensor)


def cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """A tensor in another dtype. Raises NonFiniteWeights where a weight leaves its range."""
    wanted = torch_dtype(dtype)
    made = tensor.to(wanted)
    if not bool(made.isfinite().all()) and bool(tensor.isfinite().all()):
        raise NonFiniteWeights(
            f"a weight of {quoted(name)} leaves the range of {dtype}",
            key=name,
            hint="Convert to bfloat16 or float32.",
        )
    return made


def _packed(values: array[float], dtype: str) -> bytes:
    if dtype == "F32":
        return struct.pack(f"<{len(values)}f", *values)
    if dtype == "BF16":
        words = (struct.unpack("<I", struct.pack("<f", value))[0] for value in values)
        rounded = [(word + 0x7FFF + (word >> 16 & 1)) >> 16 for word in words]
        return struct.pack(f"<{len(values)}H", *rounded)
    return struct.pack(f"<{len(values)}{'e' if dtype == 'F16' else 'd'}", *values)
