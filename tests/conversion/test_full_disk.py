"""A disk that is really full, or read-only: a typed error, and what was there is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moezoo.adapters.upcycle.convert import convert
from moezoo.adapters.upcycle.recipe import Recipe
from tests.conversion.dense import dense_t5
from tests.imports import ROOT

APART = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]


def may_mount() -> bool:
    """Whether a process may mount a disk that it alone sees."""
    if shutil.which("unshare") is None:
        return False
    command = [*APART, "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_mount(), reason="mounting is not permitted here")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_t5(tmp_path_factory.mktemp("dense") / "t5", num_layers=2)


@pytest.fixture(scope="module")
def old(t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("old") / "old"
    convert(t5, place, Recipe(2))
    return place


def size(place: Path) -> int:
    """Bytes of a directory in whole pages, which a tmpfs gives out."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in place.iterdir())


def attempt(
    action: str, source: Path, disk: Path, room: int, *, holding: Path | None, then: str = ":"
) -> dict[str, Any]:
    """Try on a disk of `room` bytes that holds a copy of a directory."""
    disk.mkdir()
    copied = ":" if holding is None else f"cp -r '{holding}' '{disk}/old'"
    words = f"'{sys.executable}' -m tests.conversion.full_disk {action} '{source}' '{disk}'"
    mounted = f"mount -t tmpfs -o size={room} tmpfs '{disk}'"
    script = f"{mounted}; {copied}; {then}; {words}"
    done = subprocess.run([*APART, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_conversion_that_does_not_fit_says_so_and_leaves_nothing(
    share: float, t5: Path, tmp_path: Path
) -> None:
    convert(t5, tmp_path / "whole", Recipe(8))
    room = int(share * size(tmp_path / "whole"))
    found = attempt("upcycle", t5, tmp_path / "disk", room, holding=None)
    assert "bytes are needed" in found["said"] or "full" in found["said"]
    assert found["names"] == []


def test_a_conversion_that_fits_is_made(t5: Path, tmp_path: Path) -> None:
    convert(t5, tmp_path / "whole", Recipe(8))
    room = size(tmp_path / "whole") + (64 << 10)
    found = attempt("upcycle", t5, tmp_path / "disk", room, holding=None)
    assert (found["said"], found["names"]) == ("", ["out"])


@pytest.mark.parametrize("action", ["over", "save"])
def test_a_full_disk_costs_the_old_checkpoint_nothing(
    action: str, t5: Path, old: Path, tmp_path: Path
) -> None:
    room = size(old) + size(old) // 3
    source = t5 if action == "over" else old
    found = attempt(action, source, tmp_path / "disk", room, holding=old)
    assert found["said"]
    assert found["kept"]
    assert found["names"] == ["old"]


@pytest.mark.parametrize("action", ["upcycle", "over", "save"])
def test_a_read_only_disk_is_refused_and_unchanged(
    action: str, t5: Path, old: Path, tmp_path: Path
) -> None:
    disk, source = tmp_path / "disk", old if action == "save" else t5
    found = attempt(
        action, source, disk, 64 << 20, holding=old, then=f"mount -o remount,ro '{disk}'"
    )
    assert "read-only" in found["said"].lower()
    assert found["kept"]
    assert found["names"] == ["old"]
