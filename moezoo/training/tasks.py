"""Fine-tuning tasks: pairs from files, toy tasks from the embedded text, metrics."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moezoo.errors import ConfigError, CorruptFile, MissingExtra, did_you_mean
from moezoo.text_files import Row, rows, text_of
from moezoo.training.corpus import stdlib_sources

Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """How pairs are fed to a model and what tells a good answer.

    prefix: put before every source. source, target: fields of a row. num_beams: of generation.
    metrics: names of `METRICS`. max_source, max_target: tokens.
    """

    prefix: str = ""
    source: str = "source"
    target: str = "target"
    num_beams: int = 1
    metrics: tuple[str, ...] = ("exact_match", "token_f1")
    max_source: int = 512
    max_target: int = 128


# The settings of the Hugging Face guides for these tasks.
TASKS: dict[str, Task] = {
    "pairs": Task(),
    "translation": Task(
        prefix="translate English to German: ",
        source="en",
        target="de",
        num_beams=4,
        metrics=("bleu", "exact_match"),
        max_source=128,
    ),
    "summarization": Task(
        prefix="summarize: ",
        source="document",
        target="summary",
        num_beams=4,
        metrics=("rouge_l", "token_f1"),
        max_source=1024,
    ),
    # Toy tasks with a known ceiling, made from the sources of this Python.
    "identifiers": Task(prefix="words: ", max_source=24, max_target=24),
    "docstrings": Task(prefix="summarize: ", max_source=160, max_target=48),
}


def task(name: str) -> Task:
    """A task by name. Raises ConfigError naming the nearest."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}", field="task", hint=did_you_mean(name, TASKS))
    return TASKS[name]


def read_pairs(path: str | Path, *, source: str, target: str, header: bool = True) -> list[Pair]:
    """Pairs from a JSONL file (nested under "translation" too), or a CSV or TSV file with a header
    or, without, of two columns, the source first.

    Raises CorruptFile naming the line (see `text_files.rows`) or a
    file without pairs, ConfigError naming line and field.
    """
    fields = {"source": source, "target": target}
    found = rows(path, columns=None if header else (source, target))
    pairs = [pair_of(row, f"line {number}", path, **fields) for number, row in found]
    if not pairs:
        raise CorruptFile("no pairs in it", path=path)
    return pairs


def identifier_pairs() -> list[tuple[str, Pair]]:
    """(module, (identifier, its words)) for every function and class name of this Python's
    library.
    """
    found = []
    seen = set()
    for module, tree in stdlib_sources():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in seen:
                seen.add(node.name)
                words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", node.name)
                if len(words) > 1:
                    found.append((module, (node.name, " ".join(words).lower())))
    return found


def docstring_pairs() -> list[tuple[str, Pair]]:
    """(module, (docstring without its first line, that line)): a summary written by the author."""
    found = []
    for module, tree in stdlib_sources():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n")
                if len(rest.split()) >= 8 and 3 <= len(first.split()) <= 20:
                    found.append((module, (" ".join(rest.split()), first.strip())))
    return found


def split_pairs(pairs: Sequence[tuple[str, Pair]]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; a module is never divided."""
    train: list[Pair] = []
    held: list[Pair] = []
    for module, pair in pairs:
        tenth = hashlib.sha256(module.encode()).digest()[0] < 26
        (held if tenth else train).append(pair)
    return train, held


def exact_match(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of answers that are right to the letter."""
    same = sum(a.strip() == b.strip() for a, b in zip(found, wanted, strict=True))
    return same / max(len(wanted), 1)


def token_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean F1 of the words of answer and reference, as multisets (SQuAD)."""
    total = 0.0
    for a, b in zip(found, wanted, strict=True):
        ours, theirs = a.lower().split(), b.lower().split()
        common = sum(min(ours.count(w), theirs.count(w)) for w in set(ours))
        total += 2 * common / max(len(ours) + len(theirs), 1)
    return total / max(len(wanted), 1)


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU by sacreBLEU, 0 to 100. Raises MissingExtra where it is not installed."""
    try:
        import sacrebleu
    except ImportError:
        raise MissingExtra("BLEU", "sacrebleu", extra="train") from None
    return float(sacrebleu.corpus_bleu(list(found), [list(wanted)]).score)


def rouge_l(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean ROUGE-L F1 by rouge-score. Raises MissingExtra where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtra("ROUGE", "rouge-score", extra="train") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = (scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(found, wanted, strict=True))
    return float(sum(scores) / max(len(wanted), 1))


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "bleu": bleu,
    "rouge_l": rouge_l,
}


def pair_of(row: Row, place: str, path: str | Path, *, source: str, target: str) -> Pair:
    """The two texts of a row, nested under "translation" or not. Raises as `text_files.text_of`."""
    inner = row.get("translation")
    row = inner if isinstance(inner, dict) else row
    for field in (source, target):
        if field not in row:
            reason, hint = f"{place} has no text {field!r}", _of_fields(row)
            raise ConfigError(reason, path=path, field=field, hint=hint)
    return text_of(row, source, place, path), text_of(row, target, place, path)


def _of_fields(row: Row) -> str:
    """How to read a row that has other fields than were looked for."""
    known = [name for name, task in TASKS.items() if {task.source, task.target} <= row.keys()]
    named = ", ".join(str(name)[:40] for name in row) or "none"
    return (
        f"Its fields are {named}. "
        + (f"Pass --task {known[0]}, or say" if known else "Say")
        + " --source-field and --target-field; a table without a header has --no-header."
    )
