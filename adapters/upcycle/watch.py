"""Which bytes a source holds: their sha256, and whether somebody writes to them meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from moezoo.adapters.formats import Source
from moezoo.adapters.upcycle.background import file_hash
from moezoo.errors import CheckpointError

_ARRAYS = "arrays"  # what the folders of a source are called among its hashed files
Stamps = list[tuple[str, int, int, int]]


def stamps(source: Source) -> Stamps:
    """What changes when somebody writes to the source."""
    files = [*source.files, source.directory / "config.json", *_inside(source)]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found]


def refuse_change(source: Source, before: Stamps) -> None:
    """Raise CheckpointError when the source is not what it was at the time of `before`."""
    if stamps(source) != before:
        raise CheckpointError(
            "the source changed while it was read",
            path=source.path,
            hint="Convert it again when nothing writes to it.",
        )


def hash_names(source: Source) -> list[str]:
    """What is hashed: every weight file, and all files of folders together."""
    return [file.name for file in source.files] + ([_ARRAYS] if any(_inside(source)) else [])


def source_hashes(source: Source) -> dict[str, str]:
    """sha256 of all that `hash_names` names; reads every weight file."""
    return {file.name: file_hash(file) for file in source.files} | folder_hashes(source)


def folder_hashes(source: Source) -> dict[str, str]:
    """One sha256 for all files in the source's folders, of their names and the sha256 of each."""
    digest, some = hashlib.sha256(), False
    for file in _inside(source):
        some = True
        digest.update(f"{file.parent.name}/{file.name} {file_hash(file)}\n".encode())
    return {_ARRAYS: digest.hexdigest()} if some else {}


def _inside(source: Source) -> Iterator[Path]:
    for folder in source.folders:
        yield from sorted(file for file in folder.rglob("*") if file.is_file())
