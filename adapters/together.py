"""Saving by all ranks of a run: one directory, all or nothing, of which each writes its part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from moezoo import errors
from moezoo.adapters.writer import replacing_directory, typed_errors
from moezoo.errors import SaveError
from moezoo.functional.collective import gathered_texts, rank_of_all

T = TypeVar("T")


def replacing_together(
    target: str | Path,
    *,
    overwrite: bool,
    bytes_needed: int,
    begin: Callable[[Path], object],
    write: Callable[[Path], int],
) -> None:
    """`replacing_directory` for all ranks, which must all call it and see one file system.

    The first rank makes the directory and calls `begin`; then every rank calls `write`, which says
    how many bytes it wrote; then the first one commits. What goes wrong anywhere is raised
    everywhere, and the target is then what it was.

    Raises SaveError, or what a rank raised.
    """
    with ExitStack() as stack:
        own = replacing_directory(target, overwrite=overwrite, bytes_needed=bytes_needed)
        stage = agreed(lambda: str(stack.enter_context(own)), first=True)
        folder = Path(gathered_texts(stage or "")[0])
        agreed(lambda: begin(folder), first=True)
        written = agreed(lambda: _typed(write, folder, Path(target)))
        total = sum(map(int, gathered_texts(str(written))))
        if total != bytes_needed:
            wanted = f"{bytes_needed} bytes"
            reason = "the ranks did not write every byte once"
            raise SaveError(reason, path=str(target), expected=wanted, found=total)
        agreed(stack.pop_all().close, first=True)


def agreed(step: Callable[[], T], *, first: bool = False) -> T | None:
    """Take a step on every rank, or on the first one alone, and go on if it ended well everywhere;
    else raise on every rank what went wrong on one.
    """
    mine = not first or rank_of_all() == 0
    try:
        result = step() if mine else None
    except BaseException as error:
        gathered_texts(f"{type(error).__name__}\n{error}")
        raise
    for rank, text in enumerate(gathered_texts("")):
        if text:
            name, _, message = text.partition("\n")
            kind = getattr(errors, name, SaveError)
            raise kind(message if first else f"rank {rank}: {message}")
    return result


def _typed(write: Callable[[Path], int], folder: Path, target: Path) -> int:
    with typed_errors(target):
        return write(folder)
