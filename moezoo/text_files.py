"""Text and rows in files of UTF-8: plain lines, JSONL, CSV and TSV, each read once, line by line.

A line ends at "\\n" (or "\\r\\n") and nowhere else: U+2028, U+0085, a form feed or a lone "\\r"
belong to a text. CSV and TSV are read by the csv module: fields of a CSV may hold quoted line
breaks, in a TSV a quote is a character like any other. A byte order mark at the start is none of
the text.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from moezoo.errors import ConfigError, CorruptFile, did_you_mean

Row = dict[str, Any]
_TABLES = {".csv": ",", ".tsv": "\t"}
_ROWS = (*_TABLES, ".jsonl", ".ndjson")
_LONGEST = 2**31 - 1  # of a field: the largest limit that the csv module takes on every system
_limit = threading.Lock()


def has_rows(path: str | Path) -> bool:
    """Whether the file's name says that it holds rows with fields, not plain text."""
    return Path(path).suffix.lower() in _ROWS


def lines(file: str | Path | BinaryIO) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line of a file, or of standard input's bytes, without its
    end.

    Raises CorruptFile for a file that cannot be read, naming the line that is not UTF-8.
    """
    return ((number, _without_end(line)) for number, line in _decoded(file))


def rows(path: str | Path, *, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Line number and fields of every row of a CSV or TSV file with a header, else of a JSONL file.

    `columns` are the names in a table that has no header.

    A row that spans lines has the number of its first. Blank lines are no rows, but an empty cell
    each in a table of one column, which has no other way to write it. Raises CorruptFile naming the
    line of a row that is malformed, has a field twice, or not as many as the header.
    """
    delimiter = _TABLES.get(Path(path).suffix.lower())
    return _json_rows(path) if delimiter is None else _table_rows(path, delimiter, columns)


def texts(path: str | Path, *, field: str) -> Iterator[tuple[int, str]]:
    """Line number and text: a field of each row (see `has_rows`), else every line of a text file.

    Raises CorruptFile as `lines` and `rows`, ConfigError naming the line without such a text.
    """
    if not has_rows(path):
        return lines(path)
    return ((number, text_of(row, field, f"line {number}", path)) for number, row in rows(path))


def paragraphs(path: str | Path) -> Iterator[str]:
    """The texts between the blank lines of a text file. Raises CorruptFile as `lines`."""
    part: list[str] = []
    for _, line in lines(path):
        if line.strip():
            part.append(line)
        elif part:
            yield "\n".join(part)
            part = []
    if part:
        yield "\n".join(part)


def text_of(row: Mapping[str, Any], field: str, place: str, path: str | Path) -> str:
    """The text of a row's field. Raises ConfigError naming the place (such as "line 3") and the
    nearest field, CorruptFile for half of a surrogate pair, which is no character.
    """
    text = row.get(field)
    if not isinstance(text, str):
        hint = did_you_mean(field, row)
        raise ConfigError(f"{place} has no text {field!r}", path=path, field=field, hint=hint)
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = f"{place}: {field!r} holds half of a surrogate pair, which is no character"
        raise CorruptFile(reason, path=path, key=field) from None
    return text


def _decoded(file: str | Path | BinaryIO) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends."""
    path = file if isinstance(file, (str, Path)) else "standard input"
    try:
        with (
            Path(file).open("rb") if isinstance(file, (str, Path)) else nullcontext(file) as stream
        ):
            for number, line in enumerate(stream, 1):
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if not line:
                        return
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = f"line {number} is not UTF-8 text: {error.reason}"
                    hint = "Save the file as UTF-8."
                    raise CorruptFile(reason, path=path, hint=hint) from None
    except CorruptFile:
        raise
    except OSError as error:
        raise CorruptFile(f"cannot be read: {error.strerror}", path=path) from None
    except ValueError:
        raise CorruptFile("no path can hold a null byte", path=path) from None


def _without_end(line: str) -> str:
    return line[:-1].removesuffix("\r") if line.endswith("\n") else line


def _json_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            hint = "A JSONL file has an object per line."
            raise CorruptFile(
                f"line {number} is not JSON: {reason}", path=path, hint=hint
            ) from None
        if not isinstance(row, dict):
            raise CorruptFile(f"line {number} is not a JSON object", path=path)
        yield number, row


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError(f"the field {_twice([name for name, _ in pairs])!r} is there twice")
    return row


def _twice(names: list[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])


def _table_rows(
    path: str | Path, delimiter: str, columns: Sequence[str] | None
) -> Iterator[tuple[int, Row]]:
    header = None if columns is None else list(columns)
    for number, cells in _table(path, delimiter):
        if not cells and (header is None or len(header) > 1):
            continue
        cells = cells or [""]
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                reason = f"the header has the column {_twice(header)!r} twice"
                raise CorruptFile(reason, path=path)
        elif len(cells) != len(header):
            raise CorruptFile(
                f"line {number} has another number of columns than "
                + ("the header" if columns is None else f"{', '.join(header)}"),
                path=path,
                expected=len(header),
                found=len(cells),
            )
        else:
            yield number, dict(zip(header, cells, strict=True))


def _table(path: str | Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row; none of a blank line."""
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = _next(reader)
        except csv.Error as error:
            raise CorruptFile(f"the row of line {number}: {error}", path=path) from None
        if cells is None:
            return
        yield number, cells


def _csv_lines(path: str | Path) -> Iterator[str]:
    """Lines as a file opened with newline="" has them, which is what the csv module wants."""
    for _, line in _decoded(path):
        yield from io.StringIO(line, newline="")


def _next(reader: Any) -> list[str] | None:
    """The next row, however long its fields. The limit on them belongs to the whole process, so it
    is lifted for one row and put back.
    """
    with _limit:
        before = csv.field_size_limit(_LONGEST)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(before)
