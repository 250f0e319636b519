"""Names of tensors on disk and in a wrapped model, as transformers loads and saves: one table,
`adapters/names.py`, both ways.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from moezoo.adapters.names import SWITCH, disk_names, is_stray, memory_name
from moezoo.errors import TensorMismatch

INNER = "model."  # what a wrapped model calls the moezoo model
_STACKS = ("wi", "wi_0", "wi_1", "wo")


class DiskNames(WeightRenaming):  # type: ignore[misc]
    """A tensor's name on disk becomes the one in memory; what no table names stays as it is.

    An expert of a stack keeps its number, for the converter that puts the stack together.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(r"^", "")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in memory, and None: no converter is meant."""
        try:
            place = memory_name(source_key)
        except TensorMismatch:
            return source_key, None
        self._was_used = True  # type: ignore[misc]
        if place.expert is not None:
            start, _, leaf = place.name.rpartition(".")
            return f"{INNER}{start}.expert_{place.expert}.{leaf}.weight", None
        return INNER + place.name, None

    def reverse_transform(self) -> MemoryNames:
        return MemoryNames()


class MemoryNames(WeightRenaming):  # type: ignore[misc]
    """The inverse of `DiskNames`, into moezoo's layout."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(r"^", "")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name on disk, and None: no converter is meant."""
        try:
            return disk_names(source_key.removeprefix(INNER), mlp=SWITCH)[0], None
        except (IndexError, TensorMismatch):  # of another library, such as an adapter's
            return source_key, None

    def reverse_transform(self) -> DiskNames:
        return DiskNames()


def register_names(model_type: str) -> None:
    """Tell transformers how files of moezoo, T5 and Switch name the tensors of a model type."""
    stacks = [
        WeightConverter(
            f".mlp.experts.expert_*.{name}.weight", f".mlp.experts.{name}", [MergeModulelist(dim=0)]
        )
        for name in _STACKS
    ]
    register_checkpoint_conversion_mapping(model_type, [DiskNames(), *stacks], overwrite=True)


def in_memory(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a saved file by the names of a wrapped model, experts stacked."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state_dict.items():
        if is_stray(name):
            continue
        place = memory_name(name)
        if place.expert is None:
            whole[INNER + place.name] = tensor
        else:
            parts.setdefault(INNER + place.name, {})[place.expert] = tensor
    for name, experts in parts.items():
        missing = next((e for e in range(len(experts)) if e not in experts), None)
        if missing is not None:
            raise TensorMismatch(f"{name}: expert {missing} is missing", key=name)
        whole[name] = torch.stack([experts[e] for e in range(len(experts))])
    return whole
