"""Ranks that are killed at any moment, in a save too, go on bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.dist
def test_ranks_killed_at_any_moment_go_on_bit_for_bit() -> None:
    """`python -m tests.training.rank_kills 50` does it fifty times."""
    command = [sys.executable, "-m", "tests.training.rank_kills", "3", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 continuations bit-exact" in done.stdout
    assert "3 of 3 typed errors" in done.stdout
