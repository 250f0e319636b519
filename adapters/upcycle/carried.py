"""The small files of a checkpoint: which are carried over, and how they are written. No code is."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from moezoo.adapters.checkpoint_source import CheckpointSource
from moezoo.adapters.formats import Source
from moezoo.adapters.formats.files import regular_file
from moezoo.adapters.generation import NAME, read_generation, written_generation
from moezoo.adapters.tensor_files import TensorPlan
from moezoo.config import SwitchConfig
from moezoo.tokenizer_files import TOKENIZER_FILES

_CARRIED = (*TOKENIZER_FILES, NAME, "preprocessor_config.json", "chat_template.json", "tekken.json",
            "vocab.bpe", "*.tiktoken", "tokenizer.model.v*")  # fmt: skip
_TERMS = (
    "LICENSE",
    "LICENCE",
    "NOTICE",
    "COPYING",
    "USE_POLICY",
)  # whoever passes a model on needs
_ANEW = ("config.json", "README.md", "recipe.json")
_TEMPLATES = "additional_chat_templates"
_WORDS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def carry_files(checkpoint: CheckpointSource, target: Path) -> list[str]:
    """Copy the files of `carried_files` byte for byte; returns their names. What an old config.json
    says about generating becomes a generation_config.json.
    """
    source = checkpoint.source.directory
    carried = carried_files(source)
    for name in carried:
        regular_file(source / name)
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    config = checkpoint.config
    if not isinstance(config, SwitchConfig):
        return carried
    stored = read_generation(source, checkpoint.description.values)
    if NAME not in carried and stored.values:
        values = written_generation(config, stored)
        write_text(target / NAME, json.dumps(values, indent=2, sort_keys=True))
    return carried


def carried_files(source: Path) -> list[str]:
    """The names of a directory's files of tokenizer, generation and licence."""
    names = [
        name
        for name in (os.listdir(source) if source.is_dir() else ())
        if (name.upper().startswith(_TERMS) or any(fnmatchcase(name, known) for known in _CARRIED))
        and not (source / name).is_dir()
    ]
    templates = (source / _TEMPLATES).glob("*.jinja")
    return sorted([*names, *(f"{_TEMPLATES}/{file.name}" for file in templates)])


def other_files(source: Source) -> list[str]:
    """The names of files beside a checkpoint that are not read, carried or written anew."""
    directory = source.directory
    read = {file.name for file in source.files} | {*carried_files(directory), *_ANEW}
    names = os.listdir(directory) if directory.is_dir() else []
    found = (n for n in names if n not in read and not n.startswith("."))
    return sorted(n for n in found if (directory / n).is_file() and not n.endswith(".index.json"))


def write_text(path: Path, text: str) -> None:
    """Write a text file that ends in a newline, the same bytes everywhere."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text if text.endswith("\n") else text + "\n")


def dtype_word(tensors: Iterable[TensorPlan]) -> str:
    """What config.json calls the dtype of most weights."""
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        nbytes[tensor.dtype] += tensor.nbytes
    return _WORDS[nbytes.most_common(1)[0][0]]


def source_places(source: Source) -> tuple[Path, ...]:
    """What a target must neither be, contain, nor lie in."""
    return (source.path, source.directory) if source.path.is_dir() else (source.path,)
