"""One attempt to write onto a disk that is too small or read-only: run by test_full_disk.py in a
process that has mounted it for itself.

    python -m tests.conversion.full_disk upcycle|over|save SOURCE DISK

Prints what the error said, what was there before and what is there now, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import moezoo
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from moezoo.errors import SaveError


class Usage(NamedTuple):
    """As `shutil.disk_usage` gives it."""

    total: int
    used: int
    free: int


def contents(disk: Path) -> dict[str, str]:
    """The hash of every file by its place."""
    files = sorted(path for path in disk.rglob("*") if path.is_file())
    return {
        str(path.relative_to(disk)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def main(action: str, source: Path, disk: Path) -> None:
    """Try; the check beforehand is told that there is space, so that the disk itself answers."""
    shutil.disk_usage = lambda _: Usage(2**62, 0, 2**62)  # type: ignore[assignment]
    attempts: dict[str, Callable[[], object]] = {
        "upcycle": lambda: convert(source, disk / "out", Recipe(8)),
        "over": lambda: convert(source, disk / "old", Recipe(8), overwrite=True),
        "save": lambda: moezoo.save(moezoo.load(source), disk / "old", overwrite=True),
    }
    before = contents(disk)
    try:
        attempts[action]()
        said = ""
    except SaveError as error:
        said = str(error)
    names = sorted(path.name for path in disk.iterdir())
    print(json.dumps({"said": said, "kept": contents(disk) == before, "names": names}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
