"""`python -m tests.hf.common`: fetch transformers' common tests, run them on the wrapper, count."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .mixins import GENERATION, PEFT, fetch, has


class Count:
    """A plugin of pytest: outcomes of each family."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        whole = type(report) is pytest.TestReport  # not a subtest
        if whole and report.when == "call":
            family = report.nodeid.split("::")[1].removesuffix("Encoder")
            family = family.replace("Hotswap", "Peft")
            self.outcomes[family, report.outcome] += 1


def main() -> int:
    fetch()
    for name in (GENERATION, PEFT):
        if not has(name):
            print(f"{name} is not run: TRANSFORMERS_TESTS names no folder that has it")
    count = Count()
    # transformers has imported modules that pytest would have liked to rewrite.
    quiet = ["-q", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*quiet, str(Path(__file__).parent), *sys.argv[1:]], plugins=[count])
    for family in sorted({family for family, _ in count.outcomes}):
        passed, failed = (count.outcomes[family, word] for word in ("passed", "failed"))
        print(f"{family}: {passed} of {passed + failed} applicable tests pass")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
