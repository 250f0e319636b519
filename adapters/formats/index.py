"""The shard index of Hugging Face checkpoints: which tensor lies in which file beside it."""

from __future__ import annotations

from pathlib import Path

from moezoo.adapters.formats.files import plain_name, quoted, read_json, regular_file
from moezoo.errors import CheckpointError, IndexFileError


def read_index(path: Path) -> dict[str, set[str]]:
    """The tensor names per shard file. Raises IndexFileError naming the index and the culprit.

    Shard names must be plain file names, and every shard must be there.
    """
    weight_map = read_json(path, IndexFileError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError("the index has no weight_map", path=path, key="weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(plain_name(shard, path), set()).add(name)
    for shard in sorted(shards):
        try:
            regular_file(path.parent / shard)
        except CheckpointError as error:
            raise IndexFileError(
                f"the shard {quoted(shard)} that the index lists is missing or no file: "
                f"{error.message}",
                path=path,
                key=shard,
                hint="Download the whole checkpoint.",
            ) from None
    return shards


def check_shard(index: Path, shard: Path, listed: set[str], found: set[str]) -> None:
    """Raise IndexFileError when a shard does not hold exactly the tensors that the index lists."""
    missing, extra = sorted(listed - found), sorted(found - listed)
    if missing or extra:
        key, what = (missing[0], "lacks") if missing else (extra[0], "also holds")
        rest = len(missing or extra) - 1
        raise IndexFileError(
            f"the index and the shard {quoted(shard.name)} disagree: the shard {what} "
            f"{quoted(key)}" + (f" and {rest} more" if rest else ""),
            path=index,
            key=key,
        )
