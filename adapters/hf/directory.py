"""A directory of transformers' own: its sparse model and tokenizer, run on a text and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.adapters.foreign import refuse_plugged
from moezoo.adapters.hf.routers import sparse_layers
from moezoo.adapters.plugged import read_plugged
from moezoo.errors import CheckpointError, ConfigError
from moezoo.recording import Tape, record


@dataclass(frozen=True)
class Recorded:
    """What routers did on a text.

    Fields: tape; ids: the token ids (T,) of every call, by layer as in the tape; piece: the text of
    an id.
    """

    tape: Tape
    ids: dict[str, list[Tensor | None]]
    piece: Callable[[int], str]


def record_text(
    path: str | Path,
    texts: Iterable[str],
    *,
    tokenizer: str | Path | None = None,
    batches: int = 8,
    batch_size: int = 16,
    length: int = 128,
    watch: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Recorded:
    """Load a causal model of transformers with its tokenizer, from local files alone, and run it in
    evaluation on texts.

    Args:
        texts: tokenised one after the other, and cut into sequences of `length` tokens.
        tokenizer: a directory; None: the model's own.
        watch: what the batches (B, L) go through on their way, such as a progress bar.

    Raises ConfigError for a model that is none of transformers' causal ones or has no experts that
    are read, and for a text that is too short; CheckpointError where transformers cannot load it.
    """
    words, model = _loaded(path, tokenizer)
    rows = _rows(words, texts, batches * batch_size, length)
    if rows.max() >= (count := model.get_input_embeddings().weight.shape[0]):
        reason = f"the tokenizer gives the id {int(rows.max())}, the model has {count} rows"
        raise ConfigError(reason, field="tokenizer", hint="Name the model's own: --tokenizer DIR.")
    with torch.no_grad(), record(model.eval()) as tape:
        seen = []
        for ids in watch(rows[i : i + batch_size] for i in range(0, len(rows), batch_size)):
            # The mask tells where sequences end.
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            seen.append(ids.flatten())
    by_layer: dict[str, list[Tensor | None]] = {name: list(seen) for name in tape.check().by_layer}
    return Recorded(tape, by_layer, lambda number: str(words.convert_ids_to_tokens(number)))


def _loaded(path: str | Path, tokenizer: str | Path | None) -> tuple[Any, Any]:
    """The tokenizer and the sparse model. Raises as `record_text`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    refuse_plugged(read_plugged(path) or {})
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    what = "its tokenizer"
    try:
        words: Any = AutoTokenizer.from_pretrained(tokenizer or path, local_files_only=True)
        what = "it"
        model: Any
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype="auto", experts_implementation="moezoo",
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # of any of its parts: a file, a field, a shape
        reason = f"transformers cannot load {what}: {' '.join(str(error).split())[:200]}"
        hint = "Name a directory that has one: --tokenizer DIR." if what != "it" else None
        raise CheckpointError(reason, path=path, hint=hint) from None
    finally:
        if shown:
            logging.enable_progress_bar()
    if lacking := sorted(map(str, loading["missing_keys"])):
        rest = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        reason = f"the weights lack {lacking[0]!r}{rest}, which transformers draws at random"
        raise CheckpointError(reason, path=path, key=lacking[0], hint="Download it again.")
    if not sparse_layers(model):
        hint = "moezoo.plug puts experts into a live model."
        reason = f"{type(model).__name__} has no experts to report on"
        raise ConfigError(reason, field="source", hint=hint)
    return words, model


def _rows(words: Any, texts: Iterable[str], most: int, length: int) -> Tensor:
    """Sequences (rows, length) of a text, at most so many. Raises ConfigError for less than one."""
    ids: list[int] = []
    for found in _ids(words, texts):
        ids += found
        if len(ids) >= most * length:
            break
    rows = min(len(ids) // length, most)
    if not rows:
        reason = f"the text has {len(ids)} tokens, a sequence has {length}"
        raise ConfigError(reason, field="text", hint="Give more text, or a smaller --length.")
    return torch.tensor(ids[: rows * length], device="cpu").view(rows, length)


def _ids(words: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    end = words.eos_token_id
    for text in texts:
        ids = words(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield [*ids, *([] if end is None else [end])]
