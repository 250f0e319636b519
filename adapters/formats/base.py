"""What every container looks like to the rest: named tensors whose bytes can be read by range."""

from __future__ import annotations

import abc
import ctypes
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moezoo.adapters.formats.files import quoted
from moezoo.adapters.open_files import OpenFiles
from moezoo.adapters.portable import read_at
from moezoo.errors import CheckpointError, CorruptFile, TensorMismatch, did_you_mean

if TYPE_CHECKING:
    import torch

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a container: its name there, safetensors dtype, shape and place.

    `path` and `offset` say where its little-endian, row-major bytes lie; `path` is None when the
    container holds it in another form, and only `Source.read` gives the bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path | None = None
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


class Source(abc.ABC):
    """An open checkpoint. Use it as a context manager, or call `close`.

    Attributes:
        path: what was opened.
        directory: where its config and tokenizer files lie.
        kind: "safetensors", "torch", "flax", "t5x", "orbax" or "gguf".
        files: every weight file, in a fixed order.
        folders: directories of further weight files, in a fixed order.
        tensors: every tensor by its name in the container, ordered by file and offset.
        metadata: the container's own string metadata.
    """

    kind: str

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        self.files = files
        self.folders: tuple[Path, ...] = ()
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._files = OpenFiles()
        self._maps: dict[Path, mmap.mmap | ctypes.Array[ctypes.c_ubyte]] = {}

    def info(self, name: str) -> TensorInfo:
        """The tensor called `name`. Raises TensorMismatch naming the nearest."""
        if name not in self.tensors:
            raise TensorMismatch(
                f"no tensor {quoted(name)}",
                path=self.path,
                key=name,
                hint=did_you_mean(name, list(self.tensors)[:500]),
            )
        return self.tensors[name]

    @abc.abstractmethod
    def read(self, name: str) -> bytes | memoryview:
        """The tensor's little-endian, row-major bytes."""

    @abc.abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, sharing memory with the file where the container allows."""

    def stack(self, names: Sequence[str]) -> torch.Tensor | None:
        """Tensors of one shape as one tensor (n, ...) that shares memory with the file, where they
        lie there one after the other; else None.
        """
        infos = [self.info(name) for name in names]
        first = infos[0]
        for place, info in enumerate(infos):
            alike = (info.path, info.dtype, info.shape) == (first.path, first.dtype, first.shape)
            if info.path is None or not alike or info.offset != first.offset + place * first.nbytes:
                return None
        return self._mapped(replace(first, shape=(len(infos), *first.shape)))

    def chunks(self, name: str, size: int = 1 << 20) -> Iterator[bytes | memoryview]:
        """The tensor's bytes in order, `size` at a time."""
        info = self.info(name)
        if info.path is None:
            whole = memoryview(self.read(name))
            for start in range(0, len(whole), size):
                yield whole[start : start + size]
            return
        for start in range(0, info.nbytes, size):
            chunk = memoryview(bytearray(min(size, info.nbytes - start)))
            self._read(info.path, chunk, info.offset + start)
            yield chunk

    def fill(self, buffer: memoryview, name: str, start: int) -> None:
        """Fill a buffer with the tensor's bytes from `start` on. Only for tensors with a `path`.

        Raises CorruptFile when the file ends before.
        """
        info = self.info(name)
        assert info.path is not None
        self._read(info.path, buffer, info.offset + start)

    def close(self) -> None:
        """Let go of the files. Tensors given out before stay valid."""
        self._files.close()
        self._maps.clear()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from a file. Raises as `read_exactly`."""
        with self._descriptor(path) as descriptor:
            read_exactly(descriptor, buffer, offset, path)

    @contextmanager
    def _descriptor(self, path: Path) -> Iterator[int]:
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(self._files.use(path, os.O_RDONLY))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
                raise CheckpointError(reason, path=path) from None
            yield descriptor

    def _read_range(self, info: TensorInfo) -> memoryview:
        assert info.path is not None
        buffer = memoryview(bytearray(info.nbytes))
        self._read(info.path, buffer, info.offset)
        return buffer

    def _mapped(self, info: TensorInfo) -> torch.Tensor:
        import torch

        assert info.path is not None
        if info.path not in self._maps:
            with self._descriptor(info.path) as descriptor:
                self._maps[info.path] = _map(info.path, descriptor)
        dtype = torch_dtype(info.dtype)
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype, device="cpu")
        flat = torch.frombuffer(
            self._maps[info.path], dtype=torch.uint8, count=info.nbytes, offset=info.offset
        )
        if info.offset % dtype.itemsize:
            flat = flat.clone()  # an unaligned tensor cannot be viewed in place
        return flat.view(dtype).view(info.shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that safetensors calls `name`."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str | None:
    """What safetensors calls a torch dtype, or None when it has no word for it."""
    wanted = str(dtype).removeprefix("torch.")
    return next((name for name, torch_name in _TORCH_NAMES.items() if torch_name == wanted), None)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's row-major bytes, in its own memory when it is contiguous. Needs no numpy."""
    tensor = tensor.detach().contiguous()
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    return memoryview(_window(tensor.data_ptr(), count, tensor)).cast("B")


def _map(path: Path, descriptor: int) -> mmap.mmap | ctypes.Array[ctypes.c_ubyte]:
    """A file in memory; a write stays private to this process.

    By torch, because every map of the mmap module keeps a descriptor, and a checkpoint may have
    more shards than a process may open files; by that module where torch cannot spell the name.
    """
    import torch

    name, size = os.fspath(path), os.fstat(descriptor).st_size
    try:
        storage = torch.UntypedStorage.from_file(name, shared=False, nbytes=size)
    except UnicodeEncodeError:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return _window(storage.data_ptr(), size, storage)


def _window(address: int, size: int, owner: object) -> ctypes.Array[ctypes.c_ubyte]:
    """Memory of `owner`, which lives as long as the window does."""
    window = (ctypes.c_ubyte * size).from_address(address)
    window.owner = owner  # type: ignore[attr-defined]
    return window


def read_exactly(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill the buffer from a file. Raises CorruptFile when the file ends before it is full."""
    done = 0
    while done < len(buffer):
        count = read_at(descriptor, buffer[done:], offset + done)
        if count == 0:
            raise CorruptFile(
                "the file ended early", path=path, expected=f"{offset + len(buffer)} bytes"
            )
        done += count
