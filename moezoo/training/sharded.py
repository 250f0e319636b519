"""Checkpoints of several ranks: each writes its own parts, by torch.distributed.checkpoint, into
one directory that appears as a whole; any number of ranks reads them.

The files are safetensors with the place of every part in their header: no pickle, and nothing that
depends on how many ranks wrote them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moezoo.adapters.together import agreed
from moezoo.adapters.writer import replacing_directory
from moezoo.errors import CorruptFile
from moezoo.functional.collective import gathered_texts, num_ranks
from moezoo.functional.shards import is_divided, reduced_layout, unwrapped
from moezoo.training.adafactor import REDUCED

FOLDER = "shards"
_STEP = "step"
_KEYS = (_STEP, "exp_avg", "exp_avg_sq", "variance", *REDUCED)  # what AdamW and Adafactor remember


def written_together(
    target: Path, write: Callable[[Path], object], *, overwrite: bool = True
) -> None:
    """`replacing_directory` for all ranks, which must all call it and see one file system: the
    first one makes the directory, every one calls `write`, and the first one puts it into its place
    when all have done so.

    Raises what a rank raised, on every rank; what was at the target is then unchanged.
    """
    with ExitStack() as stack:
        own = replacing_directory(target, overwrite=overwrite)
        stage = agreed(lambda: str(stack.enter_context(own)), first=True)
        folder = Path(gathered_texts(stage or "")[0])
        agreed(lambda: write(folder))
        agreed(stack.pop_all().close, first=True)


def write_parts(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write this rank's part of every weight, buffer and tensor of the optimizer's memory. Every
    rank must call it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = _of_model(model)
    for name, parameter in _names(model, optimizer).items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            save(_written(tensors), storage_writer=writer)
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise next((f for f in failures if isinstance(f, OSError)), error) from error


def read_parts(
    model: nn.Module, optimizer: Optimizer, folder: Path
) -> dict[int, dict[str, Tensor]]:
    """Read into the model's own tensors, sharded as they are now; returns the optimizer's memory by
    the number of the parameter, as its `state_dict` has it. Every rank must call it.

    Raises CorruptFile where files are missing, unreadable or of another model.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    tensors, memory = _of_model(model), {}
    try:
        with _quiet():
            found = set(reader.read_metadata().state_dict_metadata)
            for number, (name, parameter) in enumerate(_names(model, optimizer).items()):
                memory[number] = {
                    key: _empty(key, parameter)
                    for key in _KEYS
                    if f"optimizer.{name}.{key}" in found
                }
                for key, value in memory[number].items():
                    tensors[f"optimizer.{name}.{key}"] = value
            missing = sorted(tensors.keys() - found)
            if missing:
                raise CorruptFile(f"there is no {missing[0]!r}", path=folder, key=missing[0])
            load(_written(tensors), storage_reader=reader, no_dist=num_ranks() == 1)
    except CorruptFile:
        raise
    except Exception as error:  # a corrupt file fails in any part of the reader
        reason = f"cannot be read: {type(error).__name__}"
        raise CorruptFile(reason, path=folder) from None
    return {number: found for number, found in memory.items() if found}


def placed_memory(optimizer: Optimizer) -> None:
    """Shard an optimizer's memory of whole tensors as its parameters are."""
    for parameter, memory in optimizer.state.items():
        for key, value in memory.items():
            if is_divided(parameter) and key != _STEP:
                memory[key] = placed_whole(value, _empty(key, parameter))


def placed_whole(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as another one; each keeps its own part."""
    if not is_divided(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)


def _of_model(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": t for name, t in unwrapped(model).state_dict().items()}


def _names(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name, in its own order."""
    name_of = {id(parameter): name for name, parameter in unwrapped(model).named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {name_of[id(parameter)]: parameter for parameter in parameters}


def _empty(key: str, parameter: Tensor) -> Tensor:
    """Memory for a tensor that an optimizer keeps of a parameter."""
    if key == _STEP:
        return torch.zeros((), device="cpu")
    reduced = REDUCED.get(key)
    if not is_divided(parameter):
        shape = list(parameter.shape)
        if reduced is not None:
            shape[reduced] = 1
        return parameter.new_zeros(shape)
    from torch.distributed.tensor import zeros

    shape, placements = reduced_layout(parameter, reduced)
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return zeros(shape, dtype=parameter.dtype, device_mesh=mesh, placements=placements)


def _written(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the files hold them: they have no tensor without a dimension."""
    return {name: t.detach().view(1) if t.dim() == 0 else t.detach() for name, t in tensors.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch tells of its own plans."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
