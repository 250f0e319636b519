"""What the small files beside a tokenizer say about it. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moezoo.errors import TokenizerError

MODEL_FILES = (
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tokenizer.model",
)
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    *MODEL_FILES,
    "special_tokens_map.json",
    "spiece.vocab",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
MAX_BYTES = 256 << 20
_MAX_ID = 10_000_000
_ROLES = ("pad", "eos", "unk", "bos")
# Only as T5 writes it: no leading zero, no digit but ASCII's, and no number without a token.
_SENTINEL = re.compile(r"<extra_id_(0|[1-9][0-9]{0,5})>")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary's own: written in text, it is one id.

    special: left out when special tokens are. lstrip, rstrip: takes the white space before or
    after it. single_word: not within a word.
    """

    text: str
    number: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerFacts:
    """What a directory says of its tokenizer; what no file says is None or absent.

    extra_ids: number of sentinels. add_bos: texts begin with the bos token. roles: the text of the
    pad, eos, unk and bos tokens. ids: pad and eos as the model's config.json has them. embeddings:
    how many that model has. added: by text. files: contents, byte for byte, by name.
    """

    extra_ids: int | None = None
    add_bos: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    embeddings: int | None = None
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def sentinels(self) -> dict[int, int]:
        """Ids of the sentinels that are listed among the added tokens, by index."""
        found = {sentinel_index(text): token.number for text, token in self.added.items()}
        return {index: number for index, number in found.items() if index is not None}


def sentinel_index(text: str) -> int | None:
    """The N of `<extra_id_N>`, or None for another text."""
    match = _SENTINEL.fullmatch(text)
    return int(match[1]) if match else None


def read_facts(directory: Path) -> TokenizerFacts:
    """The facts of a directory. Raises TokenizerError for a file that cannot be understood, or
    files that contradict each other.
    """
    files = {
        name: read_file(directory / name)
        for name in TOKENIZER_FILES
        if (directory / name).is_file()
    }
    settings, names, model = (
        _object(directory / name, files)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
    )
    special = {*_listed(settings), *_listed(names)}
    extra_ids = settings.get("extra_ids")
    if extra_ids is None:
        extra_ids = sum(sentinel_index(text) is not None for text in special) or None
    elif type(extra_ids) is not int or not 0 <= extra_ids <= _MAX_ID:
        path = directory / "tokenizer_config.json"
        raise TokenizerError("extra_ids is no number of sentinels", path=path, found=extra_ids)
    embeddings = model.get("vocab_size")
    return TokenizerFacts(
        extra_ids,
        settings.get("add_bos_token") is True,
        _roles(names) | _roles(settings),
        _model_ids(model),
        embeddings if type(embeddings) is int else None,
        _added(directory, files, settings, special),
        files,
    )


def read_class(directory: Path) -> str | None:
    """The name of the tokenizer's kind in transformers. Raises TokenizerError."""
    for file in ("tokenizer_config.json", "config.json"):
        name = _object(directory / file, {}).get("tokenizer_class")
        if isinstance(name, str):
            return name
    return None


def read_file(path: Path) -> bytes:
    """The bytes of a tokenizer file. Raises TokenizerError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TokenizerError("too large for a tokenizer", path=path)
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot be read: {error.strerror}", path=path) from None


def _object(path: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """A JSON file's object; {} where there is no such file."""
    content = files.get(path.name)
    if content is None:
        content = read_file(path) if path.is_file() else b"{}"
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise TokenizerError("cannot be read as JSON", path=path) from None
    if not isinstance(values, dict):
        raise TokenizerError("no JSON object", path=path)
    return values


def _roles(values: Mapping[str, Any]) -> dict[str, str]:
    texts = {role: _text(values.get(f"{role}_token")) for role in _ROLES}
    return {role: text for role, text in texts.items() if text}


def _text(value: Any) -> str:
    """A token as files write it: its text, or an object that holds it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _listed(values: Mapping[str, Any]) -> Iterator[str]:
    """The texts of further special tokens, under the names of transformers 4 and 5."""
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = values.get(name)
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        for token in tokens if isinstance(tokens, list) else ():
            if _text(token):
                yield _text(token)


def _model_ids(values: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    for role in ("pad", "eos"):
        value = values.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value >= 0:
            found[role] = value
    return found


def _added(
    directory: Path, files: Mapping[str, bytes], settings: Mapping[str, Any], special: set[str]
) -> dict[str, AddedToken]:
    """The added tokens of every file that lists some, by text."""
    found: dict[str, AddedToken] = {}
    path = directory / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError("added_tokens_decoder is no object", path=path)
    for key, value in decoder.items():
        _put(found, _token(path, _text(value), key, value, special), path)
    path = directory / "tokenizer.json"
    beside = path.name in files and any(name in files for name in MODEL_FILES)
    for value in (_object(path, files) if beside else {}).get("added_tokens") or ():
        number = value.get("id") if isinstance(value, dict) else None
        _put(found, _token(path, _text(value), number, value, special), path)
    path = directory / "added_tokens.json"
    for text, number in _object(path, files).items():
        if text not in found or found[text].number != number:
            _put(found, _token(path, text, number, {}, special), path)
    return found


def _token(path: Path, text: str, number: Any, flags: Any, special: set[str]) -> AddedToken:
    if isinstance(number, str) and re.fullmatch(r"[0-9]{1,8}", number):
        number = int(number)
    if not text or type(number) is not int or not 0 <= number < _MAX_ID:
        raise TokenizerError("an added token has no text or no id", path=path, found=repr(number))
    names = ("lstrip", "rstrip", "single_word")
    said = {name: isinstance(flags, dict) and flags.get(name) is True for name in names}
    is_special = text in special or (isinstance(flags, dict) and flags.get("special") is True)
    return AddedToken(text, number, is_special, **said)


def _put(found: dict[str, AddedToken], token: AddedToken, path: Path) -> None:
    before = found.setdefault(token.text, token)
    if before.number != token.number:
        raise TokenizerError(
            f"two files give the token {ascii(token.text)[:60]} different ids",
            path=path,
            expected=before.number,
            found=token.number,
        )
