"""A small selection of seeded bugs is caught in every run of the tests; `make mutants` runs all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.imports import ROOT
from tests.mutants.__main__ import seed
from tests.mutants.bugs import BUGS, Bug


def test_the_quick_selection_is_caught() -> None:
    command = [sys.executable, "-m", "tests.mutants", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_bug_changes_one_place_into_code_that_compiles(bug: Bug) -> None:
    text = (ROOT / bug.path).read_text()
    assert text.count(bug.old) == 1
    compile(text.replace(bug.old, bug.new), bug.path, "exec")


def test_a_bug_without_its_place_is_refused() -> None:
    gone = Bug("gone", BUGS[0].path, "code that is not there", "")
    with pytest.raises(ValueError, match="occurs 0 times"):
        seed(gone, ROOT)
