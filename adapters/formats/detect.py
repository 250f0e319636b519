"""Which container a path holds: by file name in a directory, by first bytes for a file.

A container's reader is imported when one is found: all of them would take longer than the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from moezoo.adapters.formats.base import Source
from moezoo.adapters.formats.files import read_start, refuse_pointer, regular_file
from moezoo.errors import CheckpointError, CorruptFile


def _safetensors(path: Path, **found: Path) -> Source:
    from moezoo.adapters.formats.safetensors import SafetensorsSource

    return SafetensorsSource(path, **found)


def _torch(path: Path, **found: Path) -> Source:
    from moezoo.adapters.formats.torch_bin import TorchSource

    return TorchSource(path, **found)


def _flax(path: Path, **found: Path) -> Source:
    from moezoo.adapters.formats.flax import FlaxSource

    return FlaxSource(path, **found)


def _gguf(path: Path, **found: Path) -> Source:
    from moezoo.adapters.formats.gguf import GgufSource

    return GgufSource(path, **found)


# In the order in which transformers looks for them.
_IN_DIRECTORY: tuple[tuple[str, Callable[[Path, Path], Source]], ...] = (
    ("model.safetensors", lambda path, file: _safetensors(path, file=file)),
    ("model.safetensors.index.json", lambda path, file: _safetensors(path, index=file)),
    ("pytorch_model.bin", lambda path, file: _torch(path, file=file)),
    ("pytorch_model.bin.index.json", lambda path, file: _torch(path, index=file)),
    ("flax_model.msgpack", lambda path, file: _flax(path, file=file)),
    ("flax_model.msgpack.index.json", lambda path, file: _flax(path, index=file)),
)
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)(\.safetensors|\.bin|\.msgpack)\Z")
_ADAPTER = "adapter_config.json"
_TO_SAFETENSORS = "save_pretrained(OUT) of transformers 4.x writes safetensors: "
_FOREIGN = (
    (
        "tf_model.h5",
        "TensorFlow's HDF5 weights",
        _TO_SAFETENSORS + "load these with from_tf=True first.",
    ),
    (
        "*.ckpt*.index",
        "a TensorFlow checkpoint",
        _TO_SAFETENSORS + "convert this with load_tf_weights_in_t5 first.",
    ),
)


def open_source(path: str | Path) -> Source:
    """Open a checkpoint directory, weight file or shard index, whatever its container.

    Headers are read and checked; weights are not. Raises CheckpointError (CorruptFile,
    IndexFileError, UnsafeCheckpoint) naming the file.
    """
    path = Path(path).expanduser()
    if _is_directory(path):
        return _open_directory(path)
    is_name = not path.suffix[1:2].isalpha()  # such as Qwen2.5-0.5B, which is no file's
    if is_name and not os.path.lexists(path) and "\0" not in str(path):
        hint = (
            "moezoo reads local checkpoints only; `hf download NAME --local-dir DIR` fetches one."
        )
        raise CheckpointError("no such file or directory", path=path, hint=hint)
    regular_file(path)
    return _open_file(path)


def _open_directory(path: Path) -> Source:
    if (path / _ADAPTER).exists():  # transformers would add it to weights that lie beside it
        raise CheckpointError(
            "this is an adapter (PEFT), not a model",
            path=path,
            key=_ADAPTER,
            hint="Merge it into its model first: merge_and_unload() of peft, then save_pretrained.",
        )
    for name, open_it in _IN_DIRECTORY:
        file = path / name
        if file.exists() or file.is_symlink():
            return open_it(path, file)
    from moezoo.adapters.formats.orbax import OLD_TREE, TREE, OrbaxSource, orbax_item
    from moezoo.adapters.formats.t5x import T5xSource

    item = orbax_item(path)
    if item is not None:
        return OrbaxSource(path, item=item)
    _refuse_foreign(path)
    file = path / OLD_TREE  # orbax and TensorFlow have a file of that name too
    if file.exists() or file.is_symlink():
        return T5xSource(path, file=file)
    try:
        single = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror}", path=path) from None
    if len(single) == 1:
        reader = _gguf if single[0].suffix == ".gguf" else _safetensors
        return reader(path, file=single[0])
    wanted = ", ".join([*(name for name, _ in _IN_DIRECTORY), OLD_TREE, TREE])
    if single:
        raise CheckpointError(
            f"{len(single)} weight files and no index that joins them",
            path=path,
            hint="Pass one of the files, or restore model.safetensors.index.json.",
        )
    unfinished = (path / "metrics.jsonl").is_file()
    hint = "A training run that has not ended: go on with --resume." if unfinished else None
    if (path / "snapshots").is_dir():
        hint = "The cache of a hub: name a folder in its snapshots."
    raise CheckpointError("no weights here", path=path, expected=f"one of {wanted}", hint=hint)


def _refuse_foreign(path: Path) -> None:
    """Raise CheckpointError for containers that are known, and known not to be read."""
    for pattern, what, hint in _FOREIGN:
        found = next(iter(path.glob(pattern)), None)
        if found is not None:
            raise CheckpointError(
                f"this is {what}, which moezoo does not read", path=path, key=found.name, hint=hint
            )


def _open_file(path: Path) -> Source:
    start = read_start(path, 64)
    refuse_pointer(path, start)
    shard = _SHARD.match(path.name)
    if shard and int(shard[2]) > 1 and (path.parent / f"{shard[1]}{shard[3]}.index.json").is_file():
        hint = f"Name the folder, {path.parent}."
        raise CheckpointError(f"this is one of {int(shard[2])} shards", path=path, hint=hint)
    if path.name.endswith(".index.json"):
        if ".msgpack." in path.name:
            return _flax(path, index=path)
        reader = _torch if ".bin." in path.name else _safetensors
        return reader(path, index=path)
    if path.suffix == ".h5" or start.startswith(b"\x89HDF"):
        _, what, hint = _FOREIGN[0]
        raise CheckpointError(f"this is {what}, which moezoo does not read", path=path, hint=hint)
    if start.startswith(b"GGUF") or path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix == ".msgpack":
        return _flax(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    from moezoo.adapters.formats.array_store import DATABASE
    from moezoo.adapters.formats.orbax import OLD_TREE, TREE, OrbaxSource, orbax_item
    from moezoo.adapters.formats.t5x import T5xSource

    if path.name in (TREE, OLD_TREE, DATABASE) and orbax_item(path.parent) == path.parent:
        return OrbaxSource(path, item=path.parent)
    if path.name == OLD_TREE:
        return T5xSource(path, file=path)
    if start[8:9] == b"{":
        return _safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth") or start.startswith(b"PK\x03\x04"):
        return _torch(path)
    raise CorruptFile(
        "not a checkpoint container that moezoo knows",
        path=path,
        expected="safetensors, a PyTorch .bin, Flax MessagePack, t5x, orbax or GGUF",
    )


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be opened: {error}", path=str(path)) from None
