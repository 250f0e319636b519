"""GGUF, the container of llama.cpp: T5 in F32, F16, BF16 and Q8_0."""

from __future__ import annotations

import math
import mmap
import re
import struct
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.adapters.formats.base import TensorInfo, tensor_bytes
from moezoo.adapters.formats.files import opened, quoted, regular_file
from moezoo.adapters.formats.stored import Array, StoredSource
from moezoo.errors import CheckpointError, CorruptFile, TensorMismatch

if TYPE_CHECKING:
    import torch

_RAW = {0: "F32", 1: "F16", 30: "BF16", 28: "F64"}
_Q8_0 = 8
_BLOCK, _BLOCK_BYTES = 32, 34  # a float16 scale and 32 signed bytes
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_TEXT, _LIST = 8, 9
_MAX_TENSORS, _MAX_VALUES = 1 << 16, 1 << 20  # a vocabulary of mT5 has 250,112 texts
_MAX_TEXT = 1 << 16
_TOP = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    "dec.output_norm.weight": "decoder.final_layer_norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAME = re.compile(r"(enc|dec)\.blk\.(\d{1,5})\.(\w+)\.weight\Z")
_SELF = {f"attn_{part}": f"0.SelfAttention.{part}" for part in "qkvo"}
_SELF |= {"attn_norm": "0.layer_norm", "attn_rel_b": "0.SelfAttention.relative_attention_bias"}
_CROSS = {f"cross_attn_{part}": f"1.EncDecAttention.{part}" for part in "qkvo"}
_CROSS |= {"cross_attn_norm": "1.layer_norm",
           "cross_attn_rel_b": "1.EncDecAttention.relative_attention_bias"}  # fmt: skip


class GgufSource(StoredSource):
    """One `.gguf` file; Q8_0 tensors are given as float32, the others as they are."""

    kind = "gguf"

    def __init__(self, path: Path, *, file: Path | None = None) -> None:
        file = path if file is None else file
        super().__init__(path, (file,))
        size = regular_file(file)
        if size == 0:
            raise CorruptFile("the file is empty", path=file)
        # Mapped, so that only the pages of the header are read.
        with opened(file) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            header = _Header(view, file)
        self.metadata = {k: str(v) for k, v in header.metadata.items() if v is not None}
        gated = any(name.endswith(".ffn_gate.weight") for name, *_ in header.tensors)
        for name, shape, kind, offset in header.tensors:
            self._place(_translated(name, gated, file), shape, kind, header.data + offset, size)

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> None:
        (file,) = self.files
        count = math.prod(shape)
        if kind in _RAW:
            info = TensorInfo(name, _RAW[kind], shape, file, offset)
            nbytes = info.nbytes
        elif kind == _Q8_0 and shape and shape[-1] % _BLOCK == 0:
            nbytes = count // _BLOCK * _BLOCK_BYTES
        else:
            raise CheckpointError(
                f"tensor {quoted(name)} is quantised in a way that moezoo cannot read",
                path=file,
                key=name,
                expected="F32, F16, BF16 or Q8_0",
                found=f"ggml type {kind}",
            )
        if offset + nbytes > size:
            raise CorruptFile(
                f"tensor {quoted(name)} passes the end of the file: truncated",
                path=file,
                key=name,
                expected=f"{offset + nbytes} bytes",
                found=size,
            )
        if kind != _Q8_0:
            if name in self.tensors:
                raise CorruptFile(f"{quoted(name)} is there twice", path=file, key=name)
            self.tensors[name] = info
            return
        self.add(name, Array("F32", shape, partial(self._dequantised, offset, nbytes)))

    def read(self, name: str) -> memoryview:
        info = self.info(name)
        return super().read(name) if info.path is None else self._read_range(info)

    def tensor(self, name: str) -> torch.Tensor:
        info = self.info(name)
        return super().tensor(name) if info.path is None else self._mapped(info)

    def _dequantised(self, offset: int, nbytes: int) -> memoryview:
        import torch

        (file,) = self.files
        content = bytearray(nbytes)
        self._read(file, memoryview(content), offset)
        blocks = torch.frombuffer(content, dtype=torch.uint8).view(-1, _BLOCK_BYTES)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        return tensor_bytes(blocks[:, 2:].contiguous().view(torch.int8).float() * scale)


class _Header:
    """Metadata and tensor descriptions: (name, shape, ggml type, offset in the data)."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content, self.path, self.position, self.values = content, path, 0, 0
        if self.take(4) != b"GGUF":
            raise self.corrupt("not a GGUF file")
        version, tensors, values = self.number("<I"), self.number("<Q"), self.number("<Q")
        if version not in (2, 3):
            raise CheckpointError(
                "unknown GGUF version", path=path, expected="2 or 3", found=version
            )
        if tensors > _MAX_TENSORS or values > _MAX_TENSORS:
            raise self.corrupt("it counts more tensors or values than any T5 has")
        self.metadata = dict(self.pair() for _ in range(values))
        self.tensors = [self.tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise self.corrupt("general.alignment is no alignment")
        self.data = -(-self.position // alignment) * alignment

    def corrupt(self, what: str) -> CorruptFile:
        return CorruptFile(f"{what} (at byte {self.position})", path=self.path)

    def take(self, count: int) -> bytes:
        part = self.content[self.position : self.position + count]
        if len(part) != count:
            raise self.corrupt("the header is truncated")
        self.position += count
        return part

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > _MAX_TEXT:
            raise self.corrupt(f"a text of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def pair(self) -> tuple[str, Any]:
        return self.text(), self.value(self.number("<I"))

    def value(self, kind: int) -> Any:
        """A number or a text; of a list only that it is there: nothing in it is needed."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            raise self.corrupt(f"unknown kind of value {kind}")
        self.skip_list(0)
        return None

    def skip_list(self, depth: int) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[kind]) * count)
            return
        self.values += count
        if self.values > _MAX_VALUES or depth >= 4 or kind not in (_TEXT, _LIST):
            raise self.corrupt("a list is too long or of no known kind")
        for _ in range(count):
            if kind == _LIST:
                self.skip_list(depth + 1)
            else:
                self.skip(self.number("<Q"))

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.content):
            raise self.corrupt("the header is truncated")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.text(), self.number("<I")
        if axes > 8:
            raise self.corrupt(f"tensor {quoted(name)} has {axes} axes")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        if math.prod(shape) > 2**45:
            raise self.corrupt(f"tensor {quoted(name)} has an absurd shape")
        return name, shape, self.number("<I"), self.number("<Q")


def _translated(name: str, gated: bool, path: Path) -> str:
    """The name that Hugging Face gives a tensor of llama.cpp's T5."""
    if name in _TOP:
        return _TOP[name]
    block = _BLOCK_NAME.match(name)
    if block:
        stack = "encoder" if block[1] == "enc" else "decoder"
        mlp = "1" if stack == "encoder" else "2"
        matrices = {"ffn_gate": "wi_0", "ffn_up": "wi_1" if gated else "wi", "ffn_down": "wo"}
        parts = _SELF | _CROSS | {"ffn_norm": f"{mlp}.layer_norm"}
        parts |= {key: f"{mlp}.DenseReluDense.{matrix}" for key, matrix in matrices.items()}
        if block[3] in parts:
            return f"{stack}.block.{block[2]}.layer.{parts[block[3]]}.weight"
    raise TensorMismatch(f"no T5 has a tensor called {quoted(name)}", path=path, key=name[:120])
