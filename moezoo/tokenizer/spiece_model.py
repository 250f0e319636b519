"""The bytes of a sentencepiece model: checked before its C++ reader sees them, and given pieces.

A model is a protocol buffer whose field 1 is a piece: its text (1), score (2) and type (3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from moezoo.errors import TokenizerError
from moezoo.tokenizer_files import read_file

_MAX_PIECE_BYTES = 64 << 10  # the C++ reader dies on pieces of many megabytes
USER_DEFINED, UNUSED = 4, 5


def checked_model(path: Path) -> bytes:
    """The bytes of a model file, walked once: its C++ reader must not see a malformed one."""
    content, pieces = read_file(path), 0
    for _, start, end in _pieces(content, path):
        if end - start > _MAX_PIECE_BYTES:
            reason = f"piece {pieces} has {end - start} bytes"
            raise TokenizerError(reason, path=path, expected=f"at most {_MAX_PIECE_BYTES}")
        pieces += 1
    if not pieces:
        raise TokenizerError("no sentencepiece model: it has no pieces", path=path)
    return content


def with_pieces(content: bytes, pieces: Mapping[int, tuple[str, int]], path: Path) -> bytes:
    """A model with pieces (text, type) at the given ids: those of its own are replaced, those above
    follow each other without a gap.

    A user-defined piece is one id wherever it is written, and nothing is put before what follows:
    so has seqio made T5's sentinels.
    """
    parts: list[bytes] = []
    copied = count = 0
    for begin, _, end in _pieces(content, path):
        if count in pieces:
            parts += [content[copied:begin], _serialised(*pieces[count])]
            copied = end
        count += 1
    parts.append(content[copied:])
    while count in pieces:
        parts.append(_serialised(*pieces[count]))
        count += 1
    return b"".join(parts)


def _serialised(text: str, kind: int) -> bytes:
    content = text.encode("utf-8")
    body = b"\x0a" + _number(len(content)) + content + b"\x15\0\0\0\0\x18" + bytes([kind])
    return b"\x0a" + _number(len(body)) + body


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _pieces(content: bytes, path: Path) -> Iterator[tuple[int, int, int]]:
    """Where every piece's field and its content begin, and where both end. Raises TokenizerError
    for what is no protocol buffer.
    """
    position = 0
    while position < len(content):
        begin = position
        key, start = _varint(content, position, path)
        kind = key & 7
        if kind == 2:
            length, start = _varint(content, start, path)
        elif kind == 0:
            _, start = _varint(content, start, path)
            length = 0
        else:
            length = {1: 8, 5: 4}.get(kind, len(content) + 1)
        position = start + length
        if position > len(content):
            raise TokenizerError("truncated or no sentencepiece model", path=path)
        if key >> 3 == 1:
            yield begin, start, position


def _varint(content: bytes, position: int, path: Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise TokenizerError("truncated or no sentencepiece model", path=path)
