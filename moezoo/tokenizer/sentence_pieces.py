"""T5's tokenizer: a sentencepiece model with sentinels and added tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from torch import Tensor

from moezoo.errors import ConfigError, TokenizerError
from moezoo.tokenizer.added import AddedTokens, mark
from moezoo.tokenizer.base import BaseTokenizer, integers, json_bytes
from moezoo.tokenizer.spiece_model import UNUSED, USER_DEFINED, checked_model, with_pieces
from moezoo.tokenizer_files import (
    MODEL_FILES,
    AddedToken,
    TokenizerFacts,
    read_facts,
)

T5_SENTINELS = 100  # of T5, and what its file format means where it names no other number
_SPACE = "\u2581"  # a space within a piece


class Tokenizer(BaseTokenizer):
    """A sentencepiece model; ids equal those of seqio, which T5 and mT5 were trained with.

    The sentinels `<extra_id_0>` ... are where the added tokens list them, else those among the
    model's pieces (mT5), else the ids above them, the first one the highest (T5). As in seqio they
    begin a word: `a <extra_id_0>.` holds one, `a<extra_id_0>` is text, and nothing is put before
    what follows. transformers makes a sentinel of both, and puts an empty piece before what
    follows. A special token of the model written in text (`</s>`) is text, as in seqio; in
    transformers it is one id. Tokens that a user added are one id wherever they are written.

    Args:
        path: a `spiece.model`, or a checkpoint directory that holds one; the small files beside it
            are read either way.
        num_sentinels: how many `<extra_id_N>` there are above the pieces, against what the files
            say.

    Raises TokenizerError for a file that is missing, corrupt or no sentencepiece model, and for
    files that contradict each other.
    """

    def __init__(self, path: str | Path, *, num_sentinels: int | None = None) -> None:
        if num_sentinels is not None and num_sentinels < 0:
            raise ConfigError("num_sentinels is at least 0", field="num_sentinels")
        file = _model_file(Path(path).expanduser())
        content = checked_model(file)
        facts = read_facts(file.parent) if file.name in MODEL_FILES else TokenizerFacts()
        own = _processor(content, file)
        sentinels = _sentinels(own, facts, num_sentinels)
        added = _added(own, facts, sentinels, file)
        changed = _changed(own.vocab_size(), sentinels, added)
        self._pieces = _processor(with_pieces(content, changed, file), file) if changed else own
        self._added = AddedTokens(added, whole="<extra_id_[0-9]+>")
        pad, eos, bos = (_role(own, facts, role, file) for role in ("pad", "eos", "bos"))
        begins = [] if bos is None else [bos]
        super().__init__(
            file,
            files=_files(own, content, facts, sentinels, num_sentinels),
            pad_id=pad,
            eos_id=eos,
            sentinels=sentinels,
            special=[*begins, *(token.number for token in added if token.special)],
        )
        self.unk_id = int(own.unk_id())
        self._prefix = begins if facts.add_bos else []

    @property
    def vocab_size(self) -> int:
        """Pieces, sentinels and added tokens; a model's embedding may be larger (T5 pads to
        32128).
        """
        return int(self._pieces.vocab_size())

    def encode(self, text: str, *, eos: bool = True) -> list[int]:
        """Ids of a text, closed by eos; with eos, a bos before it where the files say so."""
        ids: list[int] = self._pieces.encode(self._added.marked(text))
        return [*self._prefix, *ids, self.eos_id] if eos else ids

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special: bool = True) -> str:
        """Text of ids; padding, eos, sentinels and special tokens are left out or, without
        skip_special, written.
        """
        words: list[str] = []
        run: list[int] = []
        for number in integers(ids):
            if self._is_text(number):
                if not (skip_special and number in self._hidden):
                    run.append(number)
            elif not skip_special:
                words += [self._decoded(run), self.piece(number)]
                run = []
        words.append(self._decoded(run))
        return " ".join(word for word in words if word)

    def piece(self, number: int) -> str:
        """What one id stands for; a piece that begins a word begins with a low bar."""
        if not 0 <= number < self.vocab_size:
            return f"<{number}>"
        if number in self._added:
            return self._added.text(number)
        text = str(self._pieces.id_to_piece(number))
        return text.removeprefix(_SPACE) if number in self._sentinels else text

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        path: str | Path,
        *,
        vocab_size: int,
        at_most: bool = False,
        pad_id: int = 0,
        eos_id: int = 1,
    ) -> Tokenizer:
        """Learn a unigram vocabulary and write it to `path` as T5 lays it out (pad 0, eos 1, unk
        2, unless told otherwise).

        `vocab_size` counts pieces; sentinels come on top. Raises TokenizerError when the text is
        too small for it; with `at_most` there are then as many as the text allows.
        """
        path = Path(path)
        prefix = str(path.with_suffix("")) if path.suffix == ".model" else str(path)
        options: dict[str, Any] = {
            "pad_id": pad_id,
            "eos_id": eos_id,
            "unk_id": next(number for number in (2, 0, 1) if number not in (pad_id, eos_id)),
            "bos_id": -1,
            "model_type": "unigram",
            "character_coverage": 0.9995,
            "num_threads": 1,  # more threads sum in another order: not the same vocabulary
            "minloglevel": 2,
            "hard_vocab_limit": not at_most,
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

    def _is_text(self, number: int) -> bool:
        """Whether sentencepiece has something to write for an id."""
        return 0 <= number < self.vocab_size and not self._pieces.IsControl(number)

    def _decoded(self, run: list[int]) -> str:
        return self._added.unmarked(self._pieces.decode(run))


def _processor(content: bytes, path: Path) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:120]
        raise TokenizerError(f"no sentencepiece model: {reason}", path=path) from None


def _known(own: Any, text: str) -> int | None:
    """The id of a piece, or None."""
    number = int(own.piece_to_id(text))
    return number if own.id_to_piece(number) == text else None


def _sentinels(own: Any, facts: TokenizerFacts, wanted: int | None) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, ..."""
    listed = facts.sentinels
    if wanted is not None and listed and len(listed) != wanted:
        reason = "num_sentinels is not what the files list"
        raise ConfigError(reason, field="num_sentinels", expected=len(listed), found=wanted)
    if wanted is None:
        listed = listed or _inside(own)
    if listed:
        return [listed[i] for i in itertools.takewhile(listed.__contains__, itertools.count())]
    count = facts.extra_ids if wanted is None else wanted
    size = own.vocab_size()
    if count is None:  # no file says it: T5's number, where it has room
        places = range(size, size + T5_SENTINELS)
        taken = any(token.number in places for token in facts.added.values())
        room = facts.embeddings is None or facts.embeddings >= size + T5_SENTINELS
        count = T5_SENTINELS if room and not taken else 0
    return [size + count - 1 - index for index in range(count)]


def _inside(own: Any) -> dict[int, int]:
    """The ids of sentinels among the model's own pieces, by index."""
    found: dict[int, int] = {}
    for index in itertools.count():
        name = f"<extra_id_{index}>"
        number = next((n for n in (_known(own, _SPACE + name), _known(own, name)) if n), None)
        if number is None:
            return found
        found[index] = number
    return found


def _added(own: Any, facts: TokenizerFacts, sentinels: list[int], path: Path) -> list[AddedToken]:
    """The tokens that a user added: neither sentinels nor special pieces of the model itself."""
    found = []
    by_number = {number: f"<extra_id_{index}>" for index, number in enumerate(sentinels)}
    for token in facts.added.values():
        number = token.number
        inside = number < own.vocab_size()
        text = by_number.setdefault(number, token.text)
        if inside:
            text = str(own.id_to_piece(number))
            text = text.removeprefix(_SPACE) if number in sentinels else text
        if token.text != text:
            raise TokenizerError(
                f"the id {number} has two tokens",
                path=path,
                expected=ascii(text)[:60],
                found=ascii(token.text)[:60],
            )
        if number not in sentinels and not (inside and _is_special(own, number)):
            found.append(token)
    return found


def _is_special(own: Any, number: int) -> bool:
    return bool(own.IsControl(number) or own.IsUnknown(number) or own.IsByte(number))


def _changed(
    size: int, sentinels: list[int], added: list[AddedToken]
) -> dict[int, tuple[str, int]]:
    """The pieces that the model lacks, by id; an id that nobody has is an unused piece."""
    pieces = {token.number: (mark(token.number), USER_DEFINED) for token in added}
    for index, number in enumerate(sentinels):
        if number >= size:
            pieces[number] = (f"{_SPACE}<extra_id_{index}>", USER_DEFINED)
    for number in range(size, max(pieces, default=0)):
        pieces.setdefault(number, (mark(number), UNUSED))
    return pieces


def _role(own: Any, facts: TokenizerFacts, role: str, path: Path) -> int | None:
    """The id of a special token: by the name that the files give, else the model's own, else what
    config.json says.
    """
    name = facts.roles.get(role)
    if name is not None:
        token = facts.added.get(name)
        number = _known(own, name) if token is None else token.number
        if number is not None:
            return number
        if role == "eos":
            reason = f"the eos token {ascii(name)[:60]} is no piece of it"
            raise TokenizerError(reason, path=path, hint="Correct eos_token beside it.")
    number = int(getattr(own, f"{role}_id")())
    return number if number >= 0 else facts.ids.get(role)


def _files(
    own: Any, content: bytes, facts: TokenizerFacts, sentinels: list[int], wanted: int | None
) -> dict[str, bytes]:
    """What `save` writes: the files as they were found, and what they leave unsaid."""
    files = dict(facts.files)
    if not any(name in files for name in MODEL_FILES):
        files["spiece.model"] = content
    if "tokenizer_config.json" in files and wanted is None:
        return files
    above = sum(number >= own.vocab_size() for number in sentinels)
    settings: dict[str, Any] = {"tokenizer_class": "T5Tokenizer", "extra_ids": above}
    for role in ("pad", "eos", "unk"):
        number = int(getattr(own, f"{role}_id")())
        if number >= 0:
            settings[f"{role}_token"] = own.id_to_piece(number)
    known = json.loads(files.get("tokenizer_config.json", b"{}"))
    return {**files, "tokenizer_config.json": json_bytes({**settings, **known, "extra_ids": above})}


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in MODEL_FILES:
        if (path / name).is_file():
            return path / name
    raise TokenizerError(
        "no sentencepiece model here",
        path=path,
        expected="spiece.model",
        hint="Put the model's spiece.model there; moezoo.tokenizer.tokenizer_of reads other kinds.",
    )
