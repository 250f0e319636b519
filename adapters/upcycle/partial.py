"""The directory in which a conversion grows: `OUT.partial`, resumable after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moezoo.adapters.portable import locked
from moezoo.adapters.writer import commit_directory, remove, typed_errors
from moezoo.errors import SaveError

_MARK = ".moezoo-plan"


@dataclass(frozen=True)
class Partial:
    """A directory being filled. `resumed`: it holds the work of a killed run of the same plan."""

    path: Path
    resumed: bool


@contextlib.contextmanager
def partial_directory(
    final: Path, *, plan_digest: str, overwrite: bool, bytes_needed: int
) -> Iterator[Partial]:
    """Fill the directory that is given; when the block ends well it becomes `final`.

    An error or an interrupt removes it. A kill leaves it, and the next run of the same plan takes
    it over; a run of another plan starts afresh.
    """
    path = partial_path(final)
    with typed_errors(final, bytes_needed):
        path.mkdir(exist_ok=True)
        with locked(path) as free:
            if free is False:
                hint = "Wait for it, or stop it."
                raise SaveError("another conversion is writing there", path=path, hint=hint)
            mark = path / _MARK
            resumed = mark.is_file() and mark.read_text("ascii", "replace") == plan_digest
            if not resumed:
                _empty(path)
                mark.write_text(plan_digest, "ascii")
            try:
                yield Partial(path, resumed)
                mark.unlink()
                commit_directory(path, final, overwrite=overwrite)
            finally:
                remove(path)  # after a swap, this is what the target was


def partial_path(final: Path) -> Path:
    """Where a conversion into `final` grows."""
    name = f"{final.name}.partial"
    if len(os.fsencode(name)) > 255:
        name = f"{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:32]}.partial"
    return final.with_name(name)


def _empty(path: Path) -> None:
    for child in path.iterdir():
        remove(child)
