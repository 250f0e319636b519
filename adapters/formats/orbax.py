"""orbax checkpoints, as newer t5x and Flax runs write them: a tree of arrays in a store.

The tree is named by `_METADATA`, in older ones by `checkpoint`, which may hold small arrays itself.
Only the model is read, never the optimizer's state. Names are flaxformer's or those of Hugging
Face's Flax models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moezoo.adapters.formats.array_store import DATABASE, PARTS, ArrayStore
from moezoo.adapters.formats.files import quoted, read_json
from moezoo.adapters.formats.flax import add_flax, arrays, read_msgpack
from moezoo.adapters.formats.stored import Array, StoredSource
from moezoo.adapters.formats.t5x import add_flaxformer
from moezoo.errors import CheckpointError, CorruptFile

TREE, OLD_TREE = "_METADATA", "checkpoint"
_ITEMS = ("default", "state", "params", "model")  # the first of these that is there is the model's
_UNFINISHED = ".orbax-checkpoint-tmp"
_PLACEHOLDER = "PLACEHOLDER://"
_EMBEDDINGS = {"token_embedder.embedding": add_flaxformer, "shared.embedding": add_flax}
# Where a training state keeps its model; its optimizer may keep arrays of the same names.
_ROOTS = (
    "target.",
    "target.params.",
    "optimizer.target.",
    "optimizer.target.params.",
    "params.",
    "params.params.",
    "state.params.",
    "model.",
    "model.params.",
    "",
)


class OrbaxSource(StoredSource):
    """An orbax item: the folder of one tree, below the checkpoint's own or the same."""

    kind = "orbax"

    def __init__(self, path: Path, *, item: Path | None = None) -> None:
        item = path if item is None else item
        if _UNFINISHED in item.name or _UNFINISHED in item.parent.name:
            raise CheckpointError("this save was never finished", path=item, key=_UNFINISHED)
        named = (item / name for name in (TREE, OLD_TREE, DATABASE))
        super().__init__(path, tuple(file for file in named if file.is_file()))
        below = () if item == path else (item.parent, item)
        configured = (folder for folder in below if (folder / "config.json").is_file())
        if not (self.directory / "config.json").is_file():
            self.directory = next(configured, self.directory)
        leaves = _leaves(item)
        root = _root(leaves, item)
        leaves = {name: array for name, array in leaves.items() if name.startswith(root)}
        self._store = None if all(leaves.values()) else ArrayStore(item)
        try:
            self._offer(item, root, leaves)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        if self._store is not None:
            self._store.close()

    def _offer(self, item: Path, root: str, leaves: Mapping[str, Array | None]) -> None:
        found, folders = [], []
        for name, inline in leaves.items():
            if inline is None:
                assert self._store is not None
                folders += [] if self._store.packed else [item / name]
                inline = self._store.array(name)
            found.append((name.removeprefix(root), inline))
        if self._store is not None and self._store.packed:
            folders = sorted(folder for folder in item.iterdir() if folder.is_dir())
        self.folders = tuple(folders)
        offer = next(add for name, add in _EMBEDDINGS.items() if root + name in leaves)
        offer(self, found)


def orbax_item(path: Path) -> Path | None:
    """The folder of the model's tree in a checkpoint directory, or None when it is not orbax's.

    It may be the only step of a run. Raises CheckpointError when several may be meant.
    """
    if _is_item(path):
        return path
    items = _items(path, "*")
    if not items and not (path / OLD_TREE).exists():
        items = _items(path, "*/*")
    if not items:
        return None
    steps = {item.parent for item in items}
    usual = [item for name in _ITEMS for item in items if item.name == name]
    if len(steps) == 1 and (usual or len(items) == 1):
        return (usual or items)[0]
    several = sorted(steps) if len(steps) > 1 else items
    raise CheckpointError(
        f"{len(several)} orbax checkpoints, and nothing tells which is meant",
        path=path,
        expected="the folder of one",
        found=", ".join(quoted(one.name) for one in several[:5]),
    )


def _items(path: Path, below: str) -> list[Path]:
    folders = {file.parent for name in (TREE, DATABASE) for file in path.glob(f"{below}/{name}")}
    return sorted(f for f in folders if _is_item(f) and not f.name.startswith(PARTS))


def _is_item(path: Path) -> bool:
    return (path / TREE).is_file() or (path / DATABASE).is_file()


def _leaves(item: Path) -> dict[str, Array | None]:
    """The arrays of the tree by their dotted names; None for those in the store."""
    old = item / OLD_TREE
    if old.is_file():
        values = read_msgpack(old)
        leaves: dict[str, Array | None] = {
            ".".join(keys): array for keys, array in arrays(values, old)
        }
        return leaves | dict.fromkeys(_placeholders(values))
    if not (item / TREE).is_file():
        raise CorruptFile(f"neither {TREE} nor {OLD_TREE} names its arrays", path=item)
    return dict.fromkeys(_named(item / TREE))


def _placeholders(values: Any, start: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _placeholders(value, f"{start}{key}.")
        elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
            yield f"{start}{key}"


def _named(path: Path) -> Iterator[str]:
    """The names in a `_METADATA`, of arrays that are in the store."""
    tree = read_json(path).get("tree_metadata")
    if not isinstance(tree, dict):
        raise CorruptFile("no tree_metadata in it", path=path, key="tree_metadata")
    for place, leaf in tree.items():
        keys = leaf.get("key_metadata") if isinstance(leaf, dict) else None
        kind = leaf.get("value_metadata") if isinstance(leaf, dict) else None
        if not isinstance(keys, list) or not isinstance(kind, dict):
            raise CorruptFile(f"the entry {quoted(place)} is malformed", path=path, key=place)
        parts = [key.get("key") if isinstance(key, dict) else None for key in keys]
        if not all(isinstance(part, (str, int)) for part in parts):
            raise CorruptFile(f"the entry {quoted(place)} has no name", path=path, key=place)
        if kind.get("skip_deserialize") is not True and kind.get("value_type") != "string":
            yield ".".join(map(str, parts))


def _root(leaves: Mapping[str, Array | None], item: Path) -> str:
    """What stands before the model's names in a training state."""
    found = {
        name.removesuffix(embedding)
        for embedding in _EMBEDDINGS
        for name in leaves
        if name == embedding or name.endswith(f".{embedding}")
    }
    usual = next((root for root in _ROOTS if root in found), None)
    if usual is not None or len(found) == 1:
        return found.pop() if usual is None else usual
    raise CheckpointError(
        "no T5 in it, or several" if found else "no T5 in it",
        path=item,
        expected=f"an array {' or '.join(_EMBEDDINGS)}",
        found=", ".join(map(quoted, sorted(found)[:5])) or f"{len(leaves)} other arrays",
    )
