"""Text to train on: the English that ships with CPython, and files of your own."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moezoo.errors import CorruptFile
from moezoo.text_files import has_rows, paragraphs, texts

_SKIPPED = {"test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3", "turtledemo"}


@dataclass(frozen=True)
class Document:
    """A text and where it comes from; a held-out split never divides a document."""

    name: str
    text: str


def python_documents() -> list[Document]:
    """The documentation topics and docstrings of this Python: about 2 MB of English, by module."""
    import pydoc_data.topics

    topics: dict[str, str] = pydoc_data.topics.topics
    documents = [Document(f"topic {name}", text) for name, text in sorted(topics.items())]
    for module, tree in stdlib_sources():
        text = "\n\n".join(_docstrings(tree))
        if len(text) > 200:
            documents.append(Document(f"module {module}", text))
    return documents


def file_documents(paths: Sequence[str | Path], *, field: str = "text") -> list[Document]:
    """Documents from text files (blank lines part them) and from a field of every row of JSONL, CSV
    and TSV files.

    Raises CorruptFile naming file and line, or the files that hold no text at all.
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        whole = (
            (text for _, text in texts(path, field=field)) if has_rows(path) else paragraphs(path)
        )
        kept = (text.strip() for text in whole)
        documents += [Document(f"{path.name}:{i}", text) for i, text in enumerate(kept) if text]
    if not documents:
        raise CorruptFile("no text found", path=", ".join(map(str, paths)))
    return documents


def split(
    documents: Iterable[Document], *, held_out: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """Documents for training and a held-out share, decided by each name alone."""
    train: list[Document] = []
    held: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.name.encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        (held if share < held_out else train).append(document)
    if not held and len(train) > 1:
        held.append(train.pop())
    return train, held


def fingerprint(texts: Iterable[str]) -> str:
    """A digest of texts in order: a run that goes on must have the same."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def stdlib_sources() -> Iterator[tuple[str, ast.Module]]:
    """Name and syntax tree of every module of this Python's library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED.isdisjoint(parts):
            continue
        try:
            yield ".".join(parts), ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            # Test data, of another Python, or a link to a file that a slim system leaves out.
            continue


def _docstrings(tree: ast.Module) -> list[str]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return [text for text in found if text]
