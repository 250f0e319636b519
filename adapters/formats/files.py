"""Reading small files safely: regular files only, bounded, and never quoting foreign content."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from moezoo.errors import CheckpointError, CorruptFile, IndexFileError

_SMALL = 32 << 20  # no config, index or tokenizer file of the family comes near 32 MiB
_POINTERS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "Run `git lfs pull`."),
    (b"<!doctype html", "an HTML page", "Download the file again; the server sent a web page."),
    (b"<html", "an HTML page", "Download the file again; the server sent a web page."),
    (b"<?xml", "an XML document", "Download the file again; the server sent an error page."),
)


def quoted(name: object) -> str:
    """A name from a file as it may appear in a message: quoted, escaped, cut at 120 characters."""
    text = ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


def regular_file(path: Path) -> int:
    """The size of a regular file (symlinks followed). Raises CheckpointError or CorruptFile."""
    try:
        status = path.stat()
    except FileNotFoundError:
        dangling = " (a symlink to nothing)" if path.is_symlink() else ""
        raise CheckpointError(f"no such file{dangling}", path=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None
    except ValueError:
        raise CheckpointError("no path can hold a null byte", path=path) from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        found = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise CorruptFile("not a file", path=path, expected="a regular file", found=found)
    return status.st_size


def opened(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises as `regular_file`."""
    regular_file(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None


def read_start(path: Path, count: int) -> bytes:
    """The first bytes of a regular file. Raises as `regular_file`."""
    with opened(path) as file:
        try:
            return file.read(count)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise CorruptFile when a weight file is really a pointer or a web page."""
    for magic, what, hint in _POINTERS:
        if start.lstrip().lower().startswith(magic):
            raise CorruptFile(f"this is {what}", path=path, hint=hint)


def read_json(
    path: Path, error: type[CheckpointError] = CorruptFile, most: int = _SMALL
) -> dict[str, Any]:
    """A JSON object from a small file of at most `most` bytes, duplicate keys refused.

    Raises `error` for anything malformed, CheckpointError for a missing or special file.
    """
    size = regular_file(path)
    if size > most:
        raise error("too large for a JSON file", path=path, expected=f"<= {most} bytes", found=size)
    content = read_start(path, most)
    refuse_pointer(path, content[:64])
    return parse_json(content, path, error)


def parse_json(content: bytes, path: Path, error: type[CheckpointError]) -> dict[str, Any]:
    """A JSON object from bytes of `path`, duplicate keys refused. Raises `error`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"the key {quoted(double)} appears twice", path=path, key=double)
        return values

    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as problem:
        reason = "nested too deeply" if isinstance(problem, RecursionError) else _where(problem)
        raise error(f"not valid JSON: {reason}", path=path) from None
    if not isinstance(values, dict):
        raise error("not a JSON object", path=path, found=type(values).__name__)
    return values


def plain_name(name: object, index: Path) -> str:
    """A shard name from an index, if it is a plain file name. Raises IndexFileError.

    The string alone is judged: in a hub cache the files themselves are symlinks, which is fine.
    """
    if not isinstance(name, str):
        raise IndexFileError("a shard name is not a string", path=index, found=type(name).__name__)
    unsafe = name in ("", ".", "..") or any(part in name for part in ("/", "\\", "\0"))
    if unsafe or os.path.isabs(name):
        raise IndexFileError(
            f"the index names the unsafe path {quoted(name)}",
            path=index,
            key=name,
            expected="plain file names beside the index",
        )
    return name


def _where(problem: ValueError) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"{problem.msg} at line {problem.lineno} column {problem.colno}"
    return "not UTF-8" if isinstance(problem, UnicodeDecodeError) else "a number is too long"
