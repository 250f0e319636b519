"""PyTorch's `.bin` container, read through torch's restricted unpickler only.

`weights_only=True` and torch >= 2.10 (older restricted unpicklers had holes); there is no fallback.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.adapters.formats.base import Source, TensorInfo, dtype_name, tensor_bytes
from moezoo.adapters.formats.files import quoted, read_start, refuse_pointer, regular_file
from moezoo.adapters.formats.index import check_shard, read_index
from moezoo.errors import CheckpointError, CorruptFile, UnsafeCheckpoint

if TYPE_CHECKING:
    import torch

_OLDEST_TORCH = (2, 10)
_ZIP = b"PK\x03\x04"


class TorchSource(Source):
    """One `pytorch_model.bin`, or a sharded one named by its `*.index.json`.

    Opening it maps the file into memory; tensors share that memory.
    """

    kind = "torch"

    def __init__(self, path: Path, *, file: Path | None = None, index: Path | None = None) -> None:
        shards = {} if index is None else read_index(index)
        single = path if file is None else file
        files = (
            (single,) if index is None else tuple(index.parent / name for name in sorted(shards))
        )
        super().__init__(path, files)
        self._loaded: dict[str, torch.Tensor] = {}
        for shard in files:
            tensors = load_bin(shard)
            if index is not None:
                check_shard(index, shard, shards[shard.name], set(tensors))
            for name, tensor in tensors.items():
                self.tensors[name] = _describe(name, tensor, shard)
                self._loaded[name] = tensor

    def read(self, name: str) -> memoryview:
        return tensor_bytes(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        return self._loaded[self.info(name).name]

    def close(self) -> None:
        super().close()
        self._loaded.clear()


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one `.bin` file. Code in it is never run.

    Raises UnsafeCheckpoint when the file asks for code, CorruptFile when it cannot be read.
    """
    import torch

    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < _OLDEST_TORCH:
        raise CheckpointError(
            "reading a .bin checkpoint safely needs a newer torch",
            path=path,
            expected="torch >= 2.10",
            found=torch.__version__,
            hint="Upgrade torch, or convert the checkpoint to safetensors.",
        )
    if regular_file(path) == 0:
        raise CorruptFile("the file is empty", path=path)
    start = read_start(path, 64)
    refuse_pointer(path, start)
    zipped = start.startswith(_ZIP)  # torch maps only its zip form; the old form is read whole
    # A foreign file can make the parser fail in any way; each way means the same here.
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # noqa: BLE001
        raise _refusal(path, error) from None
    return _state_dict(loaded, path)


def _refusal(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    asks_for_code = re.search(r"GLOBAL|Unsupported (global|class|operand|type)|REDUCE|BUILD", text)
    if type(error).__name__ == "UnpicklingError" and asks_for_code:
        return UnsafeCheckpoint(
            "this .bin asks for code to be run, which is never done",
            path=path,
            hint="Get the checkpoint as safetensors.",
        )
    return CorruptFile(
        f"not a readable .bin checkpoint ({type(error).__name__})",
        path=path,
        hint="The file is truncated, corrupt or of another kind; download it again.",
    )


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(loaded, dict):
        raise CorruptFile("not a dictionary of tensors", path=path, found=type(loaded).__name__)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CorruptFile(
                f"the entry {quoted(name)} is no named tensor",
                path=path,
                key=str(name)[:120],
                found=type(value).__name__,
            )
    return {name: value.detach() for name, value in loaded.items()}


def _describe(name: str, tensor: torch.Tensor, path: Path) -> TensorInfo:
    import torch

    dtype = dtype_name(tensor.dtype)
    if dtype is None or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CorruptFile(
            f"tensor {quoted(name)} is of a kind that weights never have",
            path=path,
            key=name,
            found=f"{tensor.dtype}, {tensor.layout}, {tensor.device}",
        )
    return TensorInfo(name, dtype, tuple(tensor.shape))
