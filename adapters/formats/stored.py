"""Sources that hold a tensor in another form than its row-major bytes: transposed or packed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moezoo.adapters.formats.base import DTYPE_BITS, Source, TensorInfo, tensor_bytes, torch_dtype
from moezoo.adapters.formats.files import quoted
from moezoo.errors import CorruptFile

if TYPE_CHECKING:
    import torch

_MATRICES = 3  # of a gated layer
_MAX_TENSORS = 1 << 17  # Switch-C has 61,440 expert matrices


@dataclass(frozen=True)
class Array:
    """An array as its container has it: dtype, shape, and how to get its row-major bytes.

    `part` gives those of one entry of the first axis, where the container can read it alone; `rows`
    those of the entries from one to another, where as many as `together` are stored together.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes | memoryview]
    part: Callable[[int], bytes | memoryview] | None = None
    rows: Callable[[int, int], bytes | memoryview] | None = None
    together: int = 0

    def entry(self, index: int, path: Path, name: str) -> torch.Tensor:
        """One entry of the first axis. Raises as `tensor`."""
        assert self.part is not None
        alone = Array(self.dtype, self.shape[1:], partial(self.part, index))
        return alone.tensor(path, name)

    def entries(self, index: int, path: Path, name: str) -> tuple[int, torch.Tensor]:
        """The entries that are read with entry `index`, and the first one's. Raises as `tensor`."""
        if self.rows is None:
            return 0, self.tensor(path, name)
        start = index // self.together * self.together
        stop = min(start + self.together, self.shape[0])
        some = Array(self.dtype, (stop - start, *self.shape[1:]), partial(self.rows, start, stop))
        return start, some.tensor(path, name)

    def tensor(self, path: Path, name: str) -> torch.Tensor:
        """The array in memory. Raises CorruptFile when its bytes are too few or too many."""
        import torch

        content = self.read()
        dtype = torch_dtype(self.dtype)
        if len(content) != math.prod(self.shape) * dtype.itemsize:
            raise CorruptFile(
                f"the bytes of {quoted(name)} do not fill its shape",
                path=path,
                key=name,
                expected=list(self.shape),
                found=f"{len(content)} bytes",
            )
        if not content:
            return torch.empty(self.shape, dtype=dtype, device="cpu")
        own = (
            isinstance(content, memoryview) and not content.readonly
        )  # bytes are not to be changed
        own_content = content if own else bytearray(content)
        return torch.frombuffer(own_content, dtype=dtype).view(self.shape)


class StoredSource(Source):
    """A source whose tensors come from arrays, each transposed and sliced as its name demands.

    Only one tensor is in memory at a time; of stacks whose entries cannot be read alone, those of a
    layer: read again for each expert, they would be read as often as there are experts.
    """

    def __init__(self, path: Path, files: tuple[Path, ...]) -> None:
        super().__init__(path, files)
        self._arrays: dict[str, tuple[Array, int | None, bool]] = {}
        self._stacks: deque[tuple[Array, int, torch.Tensor]] = deque(maxlen=_MATRICES)

    def add(
        self, name: str, array: Array, *, expert: int | None = None, transposed: bool = False
    ) -> None:
        """Offer an array as tensor `name`: slice `expert` of its first axis, then transposed."""
        shape = array.shape if expert is None else array.shape[1:]
        if array.dtype not in DTYPE_BITS or (transposed and len(shape) != 2):
            raise CorruptFile(
                f"{quoted(name)} is not a matrix of numbers",
                path=self.path,
                key=name,
                found=f"{array.dtype} {list(array.shape)}",
            )
        if name in self.tensors:
            raise CorruptFile(f"{quoted(name)} is there twice", path=self.path, key=name)
        if len(self.tensors) >= _MAX_TENSORS:
            raise CorruptFile(f"more than {_MAX_TENSORS} tensors", path=self.path, key=name)
        self.tensors[name] = TensorInfo(name, array.dtype, shape[::-1] if transposed else shape)
        self._arrays[name] = (array, expert, transposed)

    def close(self) -> None:
        super().close()
        self._stacks.clear()
        self._arrays.clear()  # their bytes may lie in a mapped file, which goes with them

    def read(self, name: str) -> memoryview:
        return tensor_bytes(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        array, expert, transposed = self._arrays[self.info(name).name]
        if expert is None:
            part = array.tensor(self.path, name)
        elif array.part is not None:
            part = array.entry(expert, self.path, name)
        else:
            part = self._entry(array, expert, name)
        return part.T.contiguous() if transposed else part.contiguous()

    def _entry(self, array: Array, expert: int, name: str) -> torch.Tensor:
        for held, start, stack in self._stacks:
            if held is array and 0 <= expert - start < len(stack):
                return stack[expert - start].clone()
        if len(self._stacks) == _MATRICES:
            self._stacks.popleft()  # not in memory beside the one that takes its place
        start, stack = array.entries(expert, self.path, name)
        self._stacks.append((array, start, stack))
        return stack[expert - start].clone()
