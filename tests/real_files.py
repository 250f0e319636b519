"""Real files of the family, where they lie beside the checkout."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2] / "shared" / "real"


def real(name: str) -> Path:
    """The path of a real file or folder; skips the test where it is not."""
    path = _ROOT / name
    if not path.exists():
        pytest.skip(f"real files are not here: {path}")
    return path


def unpacked(name: str, target: Path) -> Path:
    """A real folder copied to `target`, its .xz files decompressed."""
    source = real(name)
    target.mkdir(parents=True)
    for file in source.iterdir():
        content = file.read_bytes()
        if file.suffix == ".xz":
            (target / file.stem).write_bytes(lzma.decompress(content))
        else:
            (target / file.name).write_bytes(content)
    return target
