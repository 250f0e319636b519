"""Tokenizers of the T5 family: sentencepiece with sentinels, and bytes (ByT5)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from moezoo.errors import ConfigError, TokenizerError

PAD, EOS, UNK = 0, 1, 2
_SENTINEL = re.compile(r"(<extra_id_\d+>)")
_MAX_MODEL_BYTES = 256 << 20
_MAX_PIECE_BYTES = 64 << 10  # the C++ reader dies on pieces of many megabytes


@dataclass(frozen=True)
class Batch:
    """Padded ids (B, L) int64 and their mask (B, L), 1 for real tokens."""

    input_ids: Tensor
    attention_mask: Tensor


class Tokenizer:
    """T5's sentencepiece tokenizer; ids equal those of transformers' T5Tokenizer.

    The sentinels `<extra_id_0>` ... take the ids above the sentencepiece vocabulary, the first one
    the highest.

    Args:
        path: a `spiece.model`, or a checkpoint directory that holds one.
        num_sentinels: how many `<extra_id_N>` there are.

    Raises TokenizerError for a file that is missing, corrupt or no sentencepiece model.
    """

    def __init__(self, path: str | Path, *, num_sentinels: int = 100) -> None:
        if num_sentinels < 0:
            raise ConfigError("num_sentinels is at least 0", field="num_sentinels")
        self.path = _model_file(Path(path))
        content = _checked(self.path)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:120]
            raise TokenizerError(f"no sentencepiece model: {reason}", path=self.path) from None
        self.num_sentinels = num_sentinels

    @property
    def vocab_size(self) -> int:
        """Pieces and sentinels; a model's embedding may be larger (T5 pads to 32128)."""
        return int(self._pieces.vocab_size()) + self.num_sentinels

    def sentinel(self, index: int) -> int:
        """The id of `<extra_id_index>`. Raises ConfigError past the last one."""
        if not 0 <= index < self.num_sentinels:
            wanted = f"0 to {self.num_sentinels - 1}"
            raise ConfigError("no such sentinel", field="index", expected=wanted, found=index)
        return self.vocab_size - 1 - index

    def encode(self, text: str, *, eos: bool = True) -> list[int]:
        """Ids of a text; sentinels written as `<extra_id_3>` become one id each."""
        ids: list[int] = []
        for part in _SENTINEL.split(text):
            number = int(part[len("<extra_id_") : -1]) if _SENTINEL.fullmatch(part) else -1
            if 0 <= number < self.num_sentinels:
                ids.append(self.sentinel(number))
            elif part:
                ids += self._pieces.encode(part)
        return [*ids, EOS] if eos else ids

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special: bool = True) -> str:
        """Text of ids; padding, eos and sentinels are left out or, without skip_special,
        written.
        """
        words: list[str] = []
        run: list[int] = []
        for number in _integers(ids):
            if self._is_piece(number):
                run.append(number)
                continue
            words.append(self._pieces.decode(run))
            run = []
            words.append("" if skip_special else self._special(number))
        words.append(self._pieces.decode(run))
        return " ".join(word for word in words if word)

    def piece(self, number: int) -> str:
        """What one id stands for; a piece that begins a word begins with a low bar."""
        is_piece = self._is_piece(number)
        return str(self._pieces.id_to_piece(number)) if is_piece else self._special(number)

    def batch(self, texts: Sequence[str], *, max_length: int | None = None) -> Batch:
        """Encode, truncate (eos stays last) and pad texts."""
        return padded([truncated(self.encode(text), max_length) for text in texts])

    @classmethod
    def train(cls, texts: Iterable[str], path: str | Path, *, vocab_size: int) -> Tokenizer:
        """Learn a unigram vocabulary and write it to `path` as T5 lays it out (pad 0, eos 1, unk
        2).

        `vocab_size` counts pieces; sentinels come on top. Raises TokenizerError when the text is
        too small for it.
        """
        path = Path(path)
        prefix = str(path.with_suffix("")) if path.suffix == ".model" else str(path)
        options: dict[str, Any] = {
            "pad_id": PAD,
            "eos_id": EOS,
            "unk_id": UNK,
            "bos_id": -1,
            "model_type": "unigram",
            "character_coverage": 0.9995,
            "num_threads": 1,  # more threads sum in another order: not the same vocabulary
            "minloglevel": 2,
        }
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_prefix=prefix,
                vocab_size=vocab_size,
                **options,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise TokenizerError(f"training failed: {reason}", path=path) from None
        Path(f"{prefix}.vocab").unlink(missing_ok=True)
        written = Path(f"{prefix}.model")
        return cls(written.rename(path) if written != path else written)

    def _is_piece(self, number: int) -> bool:
        return UNK <= number < self._pieces.vocab_size()

    def _special(self, number: int) -> str:
        if number in (PAD, EOS):
            return "<pad>" if number == PAD else "</s>"
        index = self.vocab_size - 1 - number
        return f"<extra_id_{index}>" if 0 <= index < self.num_sentinels else f"<{number}>"


class ByteTokenizer:
    """ByT5's tokenizer: a byte b is the id b + 3; 125 sentinels above, the first one the lowest.

    Ids equal those of transformers' ByT5Tokenizer (arXiv 2105.13626).
    """

    num_sentinels = 125
    vocab_size = 3 + 256 + num_sentinels

    def sentinel(self, index: int) -> int:
        """The id of `<extra_id_index>`. Raises ConfigError past the last one."""
        if not 0 <= index < self.num_sentinels:
            wanted = f"0 to {self.num_sentinels - 1}"
            raise ConfigError("no such sentinel", field="index", expected=wanted, found=index)
        return 3 + 256 + index

    def encode(self, text: str, *, eos: bool = True) -> list[int]:
        """Ids of a text's UTF-8 bytes; `<extra_id_3>` becomes one id."""
        ids: list[int] = []
        for part in _SENTINEL.split(text):
            number = int(part[len("<extra_id_") : -1]) if _SENTINEL.fullmatch(part) else -1
            if 0 <= number < self.num_sentinels:
                ids.append(self.sentinel(number))
            else:
                ids += [byte + 3 for byte in part.encode("utf-8")]
        return [*ids, EOS] if eos else ids

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 are left out."""
        content = b""
        for number in _integers(ids):
            if 3 <= number < 259:
                content += bytes([number - 3])
            elif not skip_special:
                content += self._special(number).encode()
        return content.decode("utf-8", errors="ignore")

    def piece(self, number: int) -> str:
        """What one id stands for: a byte as ASCII shows it, else its escape."""
        return ascii(bytes([number - 3]))[2:-1] if 3 <= number < 259 else self._special(number)

    def batch(self, texts: Sequence[str], *, max_length: int | None = None) -> Batch:
        """Encode, truncate (eos stays last) and pad texts."""
        return padded([truncated(self.encode(text), max_length) for text in texts])

    @staticmethod
    def _special(number: int) -> str:
        names = {PAD: "<pad>", EOS: "</s>", UNK: "<unk>"}
        return names.get(number, f"<extra_id_{number - 259}>")


def tokenizer_of(directory: str | Path) -> Tokenizer | ByteTokenizer:
    """The tokenizer of a checkpoint directory: its sentencepiece model, or bytes where its
    tokenizer_config.json says so. Raises TokenizerError.
    """
    path = Path(directory).expanduser()
    settings = path / "tokenizer_config.json"
    if settings.is_file() and "ByT5" in settings.read_text(encoding="utf-8", errors="replace"):
        return ByteTokenizer()
    return Tokenizer(path)


def padded(rows: Sequence[Sequence[int]], *, value: int = PAD) -> Batch:
    """Rows of ids as one batch, filled up on the right with `value`."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), value, dtype=torch.int64, device="cpu")
    mask = torch.zeros((len(rows), length), dtype=torch.int64, device="cpu")
    for row, numbers in enumerate(rows):
        ids[row, : len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
        mask[row, : len(numbers)] = 1
    return Batch(ids, mask)


def truncated(ids: list[int], max_length: int | None) -> list[int]:
    """At most `max_length` ids; what is cut keeps its last id (eos)."""
    if max_length is None or len(ids) <= max_length:
        return ids
    if max_length < 1:
        raise ConfigError("max_length is at least 1", field="max_length", found=max_length)
    return [*ids[: max_length - 1], ids[-1]]


def _integers(ids: Iterable[int] | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else [int(number) for number in ids]


def _model_file(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_dir():
        return path
    for name in ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    hint = "Put the model's spiece.model there"
    hint += ", or use moezoo.ByteTokenizer() for ByT5."
    raise TokenizerError(
        "no sentencepiece model here", path=path, expected="spiece.model", hint=hint
    )


def _checked(path: Path) -> bytes:
    """The bytes of a model file, walked once: its C++ reader must not see a malformed one."""
    try:
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise TokenizerError("too large for a tokenizer", path=path)
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot be read: {error.strerror}", path=path) from None
    position, pieces = 0, 0
    while position < len(content):
        position, number, length = _field(content, position, path)
        if number == 1:
            pieces += 1
            if length > _MAX_PIECE_BYTES:
                reason = f"piece {pieces - 1} has {length} bytes"
                raise TokenizerError(reason, path=path, expected=f"at most {_MAX_PIECE_BYTES}")
    if not pieces:
        raise TokenizerError("no sentencepiece model: it has no pieces", path=path)
    return content


def _field(content: bytes, position: int, path: Path) -> tuple[int, int, int]:
    """One top-level protobuf field: where it ends, its number and its length."""
    key, position = _varint(content, position, path)
    kind = key & 7
    if kind == 2:
        length, position = _varint(content, position, path)
    elif kind == 0:
        _, position = _varint(content, position, path)
        length = 0
    else:
        length = {1: 8, 5: 4}.get(kind, len(content) + 1)
    if position + length > len(content):
        raise TokenizerError("truncated or no sentencepiece model", path=path)
    return position + length, key >> 3, length


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
