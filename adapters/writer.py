"""Writing that is all or nothing: beside the target, flushed to disk, committed by one rename.

Whatever happens before the rename (a full disk, a kill, power loss), the target is what it was.
A target that exists is swapped in one step (`RENAME_EXCHANGE`), never merged. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moezoo.adapters.portable import flush, is_read_only, locked
from moezoo.adapters.renaming import exchange, rename_new
from moezoo.errors import CheckpointError, SaveError, TargetExists

_MARK = ".moezoo-"
_REASONS = {
    errno.ENOSPC: ("the disk is full", "Free space, or choose another disk."),
    errno.EDQUOT: ("the disk quota is used up", "Free space, or choose another disk."),
    errno.EFBIG: ("the file-size limit is reached", "Raise `ulimit -f`, or use max_shard_size."),
    errno.EROFS: ("the file system is read-only", "Choose another place."),
    errno.EACCES: ("permission denied", "Choose a place that you may write to."),
    errno.EPERM: ("permission denied", "Choose a place that you may write to."),
    errno.EIO: ("the disk reports an input/output error", "Check the disk."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter name."),
}


@contextlib.contextmanager
def replacing_directory(
    target: str | Path, *, overwrite: bool = False, bytes_needed: int = 0
) -> Iterator[Path]:
    """Give an empty directory beside `target`; when the block ends well it becomes the target.

    Raises TargetExists when the target exists (an empty directory does not count) and `overwrite`
    is False, SaveError when writing fails. On any error nothing new is left behind.
    """
    final = checked_target(target, overwrite=overwrite, bytes_needed=bytes_needed)
    with typed_errors(final, bytes_needed), _staging(final, directory=True) as (stage, _):
        yield stage
        commit_directory(stage, final, overwrite=overwrite)


@contextlib.contextmanager
def replacing_file(
    target: str | Path, *, overwrite: bool = False, bytes_needed: int = 0
) -> Iterator[Path]:
    """Give an empty file beside `target`; when the block ends well it becomes the target."""
    final = checked_target(target, overwrite=overwrite, bytes_needed=bytes_needed)
    if final.is_dir():
        raise TargetExists("the target is a directory, a file was to be written", path=final)
    with typed_errors(final, bytes_needed), _staging(final, directory=False) as (stage, _):
        yield stage
        flush(stage)
        if overwrite:
            os.replace(stage, final)
        else:
            _rename_or_refuse(stage, final)
        flush(final.parent)


def checked_target(
    target: str | Path,
    *,
    overwrite: bool = False,
    sources: tuple[Path, ...] = (),
    bytes_needed: int = 0,
) -> Path:
    """Where a save will really end up, after everything that can be refused before any work.

    Refused: an existing target without `overwrite`, a target that is, contains or lies in one of
    the `sources`, a missing, read-only or full parent. Sweeps what a killed save left behind.
    """
    text = os.fspath(target)
    if not text or "\0" in text:
        raise SaveError("an empty path or a null byte names no target", path=repr(text))
    final = Path(os.path.realpath(os.path.expanduser(text)))
    for source in sources:
        _refuse_overlap(final, Path(os.path.realpath(source)))
    with typed_errors(final, bytes_needed):
        if not overwrite and _is_taken(final):
            hint = "Choose another, or replace it: --overwrite, in Python overwrite=True."
            raise TargetExists("the target exists already", path=final, hint=hint)
        if not final.parent.is_dir():
            _make_parents(final.parent)
        if not os.access(final.parent, os.W_OK):
            raise OSError(_access_errno(final.parent), "not writable")
        _sweep(final)
        usage = shutil.disk_usage(final.parent)
    free = usage.free
    if not usage.total and bytes_needed:
        reason = "what lies here is no disk but the system's own, such as /proc"
        raise SaveError(reason, path=final, hint="Choose another place.")
    if bytes_needed > free:
        raise SaveError(
            "the disk is too full",
            path=final,
            expected=f"{bytes_needed} bytes free",
            found=free,
            hint="Free space, or choose another disk.",
        )
    return final


def check_place(target: str | Path) -> None:
    """Refuse a place where nothing can be written, before work of which it would be the end.

    Makes nothing. Raises SaveError where its directory is missing or may not be written to.
    """
    final = Path(os.path.realpath(os.path.expanduser(os.fspath(target))))
    parent = final.parent
    if not parent.is_dir():
        reason = "a file is in the way" if parent.exists() else "there is no such directory"
        raise SaveError(reason, path=parent, hint="Make it first, or choose another place.")
    usable = os.access(parent, os.W_OK) and shutil.disk_usage(parent).total
    if not usable or (final.exists() and not os.access(final, os.W_OK)):
        hint = "Choose a place that you may write to."
        raise SaveError("nothing can be written here", path=final, hint=hint)


def commit_directory(stage: Path, final: Path, *, overwrite: bool) -> None:
    """Flush everything under `stage`, then let it take the place of `final` in one step."""
    for folder, _, files in os.walk(stage):
        for name in files:
            flush(Path(folder, name))
        flush(Path(folder))
    if overwrite and final.exists():
        exchange(stage, final, aside=final.parent / f"{_prefix(final)}{os.urandom(4).hex()}.old")
    else:
        _rename_or_refuse(stage, final)
    flush(final.parent)


@contextlib.contextmanager
def typed_errors(path: Path, bytes_needed: int = 0) -> Iterator[None]:
    """Turn what the operating system says while writing into a SaveError about `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), ""))
        needed = f" ({bytes_needed} bytes are needed)" if bytes_needed else ""
        culprit = error.filename if isinstance(error.filename, str) else None
        raise SaveError(
            f"writing failed: {reason}{needed}; what was there before is unchanged",
            path=path,
            key=culprit,
            hint=hint,
        ) from error


@contextlib.contextmanager
def _staging(final: Path, *, directory: bool) -> Iterator[tuple[Path, None]]:
    """A fresh, locked directory or file beside `final`, removed when the block leaves it behind."""
    stage = final.parent / f"{_prefix(final)}{os.urandom(8).hex()}.tmp"
    try:
        if directory:
            stage.mkdir()
        else:
            os.close(os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with locked(stage):
            yield stage, None
    finally:
        remove(stage)


def remove(path: Path) -> None:
    """Delete a file or directory tree if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _prefix(final: Path) -> str:
    # A digest, not the name: a name of 255 bytes leaves no room for a suffix.
    return f"{_MARK}{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]}-"


def _sweep(final: Path) -> None:
    """Remove what killed saves to this target left; live ones hold a lock and are left alone, and
    without locks so are all.
    """
    for path in final.parent.glob(f"{_prefix(final)}*"):
        if path.suffix == ".old" and not final.exists():
            os.rename(path, final)  # killed between the two renames of a two-step exchange
            continue
        with contextlib.suppress(FileNotFoundError), locked(path) as free:
            if free:
                remove(path)


def _rename_or_refuse(stage: Path, final: Path) -> None:
    try:
        rename_new(stage, final)
    except FileExistsError:
        raise TargetExists(
            "the target came into being meanwhile", path=final, hint="Choose another."
        ) from None


def _is_taken(final: Path) -> bool:
    if final.is_dir():
        with os.scandir(final) as entries:
            return next(entries, None) is not None
    return os.path.lexists(final)


def _refuse_overlap(final: Path, source: Path) -> None:
    same = final == source
    if not same and final.exists() and source.exists():
        same = final.samefile(source)
    if same or source in final.parents or final in source.parents:
        relation = "is" if same else "lies in" if source in final.parents else "contains"
        raise SaveError(
            f"the target {relation} the source", path=final, found=source, hint="Choose another."
        )


def _make_parents(parent: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise SaveError("a file is in the way of a parent directory", path=parent) from None


def _access_errno(parent: Path) -> int:
    return errno.EROFS if is_read_only(parent) else errno.EACCES
