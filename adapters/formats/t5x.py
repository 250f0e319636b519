"""t5x checkpoints, the first form of T5 and Switch: MessagePack for small arrays, zarr for large.

Names are flaxformer's; they are translated to Hugging Face's. Only the model (`target`) is read,
never the optimizer's state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moezoo.adapters.formats.files import plain_name, quoted
from moezoo.adapters.formats.flax import CHUNKED, arrays, read_msgpack
from moezoo.adapters.formats.stored import Array, StoredSource
from moezoo.adapters.formats.zarr import open_zarr
from moezoo.errors import CheckpointError, CorruptFile, TensorMismatch

_STATE = ("state", "optimizer")
_TOP = {
    "token_embedder.embedding": ("shared.weight", False),
    "encoder.encoder_norm.scale": ("encoder.final_layer_norm.weight", False),
    "decoder.decoder_norm.scale": ("decoder.final_layer_norm.weight", False),
    "decoder.logits_dense.kernel": ("lm_head.weight", True),
}
_BIAS = re.compile(r"(encoder|decoder)\.(?:layers_(\d+)\.)?relpos_bias\.rel_embedding\Z")
_LAYER = re.compile(r"(encoder|decoder)\.layers_(\d+)\.(.+)\Z")
_PARTS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_ATTENTION = re.compile(
    r"(attention|self_attention|encoder_decoder_attention)\.(query|key|value|out)\.kernel\Z"
)
_MATRIX = re.compile(r"mlp\.(expert\.)?(wi|wi_0|wi_1|wo)\.kernel\Z")
_NORMS = {
    "pre_attention_layer_norm.scale": "0",
    "pre_self_attention_layer_norm.scale": "0",
    "pre_cross_attention_layer_norm.scale": "1",
}
# With `scan_layers` one array holds a matrix of every layer, on an axis that the names do not tell.
_SCANNED = re.compile(
    r"(encoder|decoder)\.(?:\1|layers|scan\w*|\1_layers)\.(?:\w+_\d+\.)?"
    r"(?:pre_\w+|(?:self_|encoder_decoder_)?attention|mlp|relpos_bias)\."
)
_MLP = {"encoder": "1", "decoder": "2"}


class T5xSource(StoredSource):
    """A t5x checkpoint directory: `checkpoint` (MessagePack) and a zarr folder per large array."""

    kind = "t5x"

    def __init__(self, path: Path, *, file: Path | None = None) -> None:
        file = path / "checkpoint" if file is None else file
        super().__init__(path, (file,))
        folders: list[Path] = []
        found = list(_target_arrays(file, folders))
        self.directory = file.parent
        self.folders = tuple(folders)
        add_flaxformer(self, found)


def add_flaxformer(source: StoredSource, found: Sequence[tuple[str, Array]]) -> None:
    """Offer arrays by the names that Hugging Face gives to flaxformer's."""
    sparse = any(re.match(r".+\.mlp\.expert\.", name) for name, _ in found)
    for name, array in found:
        layer = _LAYER.match(name)
        matrix = _MATRIX.match(layer[3]) if layer else None
        if layer and matrix and matrix[1]:
            start = f"{layer[1]}.block.{layer[2]}.layer.{_MLP[layer[1]]}.mlp.experts"
            _add_experts(source, name, array, start, matrix[2])
            continue
        target, transposed = _translated(name, source.path, sparse=sparse)
        source.add(target, array, transposed=transposed)


def _add_experts(source: StoredSource, name: str, array: Array, start: str, matrix: str) -> None:
    if len(array.shape) != 3:
        raise CorruptFile(f"{quoted(name)} is no stack of experts", path=source.path, key=name)
    for expert in range(array.shape[0]):
        target = f"{start}.expert_{expert}.{matrix}.weight"
        source.add(target, array, expert=expert, transposed=True)


def _target_arrays(file: Path, folders: list[Path]) -> Iterator[tuple[str, Array]]:
    """The model's arrays; the folders of those that stand outside `file` are added to the list."""
    values: Any = read_msgpack(file)
    for key in _STATE:
        values = values.get(key, values) if isinstance(values, dict) else values
    target = values.get("target") if isinstance(values, dict) else None
    if not isinstance(target, dict):
        raise CorruptFile("no model ('target') in it", path=file)
    target = target.get("params", target)
    if not isinstance(target, dict):
        raise CorruptFile("its model ('target') is not a map of arrays", path=file)
    inline = {".".join(keys): array for keys, array in arrays(target, file)}
    yield from inline.items()
    for name in _names(target):
        if name not in inline:
            folder = file.parent / plain_name(f"target.{name}", file)
            if not _is_folder(folder):
                raise CheckpointError(
                    f"the array {quoted(name)} is missing", path=folder, key=name,
                    hint="Download the whole checkpoint.",
                )  # fmt: skip
            folders.append(folder)
            yield name, open_zarr(folder)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name of more than 255 bytes
        return False


def _names(values: dict[str, Any], start: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and CHUNKED not in value:
            yield from _names(value, f"{start}{key}.")
        else:
            yield f"{start}{key}"


def _translated(name: str, path: Path, *, sparse: bool) -> tuple[str, bool]:
    """The name that Hugging Face gives an array, and whether it is transposed there."""
    if name in _TOP:
        return _TOP[name]
    bias, layer = _BIAS.match(name), _LAYER.match(name)
    if bias:
        block = f"{bias[1]}.block.{bias[2] or 0}.layer.0.SelfAttention"
        return f"{block}.relative_attention_bias.weight", True
    if layer is None:
        raise _unknown(name, path)
    stack, block, rest = f"{layer[1]}.block.{layer[2]}.layer", layer[1], layer[3]
    attention, matrix = _ATTENTION.match(rest), _MATRIX.match(rest)
    if attention:
        cross = attention[1] == "encoder_decoder_attention"
        part = "1.EncDecAttention" if cross else "0.SelfAttention"
        return f"{stack}.{part}.{_PARTS[attention[2]]}.weight", True
    if matrix:
        mlp = "mlp" if sparse else "DenseReluDense"
        return f"{stack}.{_MLP[block]}.{mlp}.{matrix[2]}.weight", True
    if rest in _NORMS:
        return f"{stack}.{_NORMS[rest]}.layer_norm.weight", False
    if rest == "pre_mlp_layer_norm.scale":
        return f"{stack}.{_MLP[block]}.layer_norm.weight", False
    if rest == "mlp.router.router_weights.w.kernel":
        return f"{stack}.{_MLP[block]}.mlp.router.classifier.weight", True
    if rest == "mlp.router.router_weights.w.bias":
        return f"{stack}.{_MLP[block]}.mlp.router.classifier.bias", False
    raise _unknown(name, path)


def _unknown(name: str, path: Path) -> TensorMismatch:
    if _SCANNED.match(name):
        hint = "Write it unscanned: scan_layers = False, with t5x's own restore."
        reason = f"a scanned t5x checkpoint, its layers stacked on an axis ({quoted(name)})"
        return TensorMismatch(reason, path=path, key=name[:120], hint=hint)
    return TensorMismatch(f"no T5 has an array called {quoted(name)}", path=path, key=name[:120])
