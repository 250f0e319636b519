"""Killed by the kernel at every system call that changes the disk: wholly old or wholly new."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from tests.conversion.dense import dense_t5
from tests.conversion.full_disk import contents
from tests.imports import ROOT

CHANGES = (
    "copy_file_range", "fallocate", "fchmod", "fdatasync", "fsync", "ftruncate", "link", "mkdir",
    "pwrite64", "rename", "renameat2", "rmdir", "sendfile", "unlink", "unlinkat", "write",
)  # fmt: skip
CONVERT = """
import sys
from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
convert(sys.argv[1], sys.argv[2], Recipe(3), overwrite=True)
"""
SAVE = """
import sys, moezoo
moezoo.save(moezoo.load(sys.argv[1]), sys.argv[2], overwrite=True)
"""


def traced(options: list[str], program: str, source: Path, target: Path) -> tuple[int, str]:
    """Run under strace; the exit status and what strace said."""
    command = ["strace", "-f", "-qq", *options, sys.executable, "-c", program, source, target]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def may_trace() -> bool:
    """Whether strace is here and may inject signals."""
    if shutil.which("strace") is None:
        return False
    options = ["-e", "trace=getpid", "-e", "inject=getpid:signal=KILL"]
    return traced(options, "import os; os.getpid()", Path(), Path())[0] in (-9, 137)


pytestmark = pytest.mark.skipif(not may_trace(), reason="strace is not here, or not permitted")


def calls_of(program: str, source: Path, target: Path) -> set[str]:
    """Which of the calls an undisturbed run makes."""
    options = ["-c", "-U", "name,calls", "-e", f"trace={','.join(CHANGES)}"]
    code, said = traced(options, program, source, target)
    assert code == 0, said
    return set(re.findall(r"^(\w+) +\d+$", said, re.M)) - {"total"}


# A process that imports torch takes seconds under strace: of a save the first call of each kind.
@pytest.mark.parametrize(("action", "most"), [("convert", 1000), ("save", 1)])
def test_a_kill_at_any_system_call_leaves_the_old_or_the_new(
    action: str, most: int, tmp_path: Path
) -> None:
    dense, folder = dense_t5(tmp_path / "dense", num_layers=2), tmp_path / "folder"
    convert(dense, tmp_path / "old", Recipe(2))
    convert(dense, tmp_path / "source", Recipe(3))
    program, source = (CONVERT, dense) if action == "convert" else (SAVE, tmp_path / "source")
    target = folder / "target"
    shutil.copytree(tmp_path / "old", target)
    old = contents(target)
    calls = calls_of(program, source, target)
    new, killed = contents(target), Counter[str]()
    assert old != new
    assert {"pwrite64", "fsync", "renameat2"} <= calls
    for name in calls:
        for number in range(1, most + 1):  # strace counts the calls of each thread by itself
            shutil.rmtree(target)
            shutil.copytree(tmp_path / "old", target)
            inject = f"inject={name}:signal=KILL:when={number}"
            code, _ = traced(["-e", f"trace={name}", "-e", inject], program, source, target)
            assert contents(target) in (old, new), f"{name} {number}"
            if code == 0:
                break
            killed[name] += 1
    assert set(killed) == calls
    assert traced(["-e", "trace=mkdir"], program, source, target)[0] == 0
    assert contents(target) == new
    assert [path.name for path in folder.iterdir()] == ["target"]
